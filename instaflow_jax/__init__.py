"""InstaFlow in JAX: rectified flow from Stable Diffusion to one-step image generation."""

__version__ = "0.2.0"
