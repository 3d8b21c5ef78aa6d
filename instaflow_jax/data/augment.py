"""Small shifts and scalings of the pictures, filled with white: one emoji becomes many without becoming another."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray


def augment(
    key: PRNGKeyArray, images: Float[Array, "B H W C"], max_shift: int = 1, max_zoom: float = 0.05
) -> Float[Array, "B H W C"]:
    """Move each picture by up to `max_shift` whole pixels each way and scale it about its centre by 1 ± `max_zoom`.

    The defaults stay within the margin that nearly all emoji leave at 32 pixels, so nothing is cut off.

    Args:
      key: one key a batch; each picture gets its own split.
      images: floats whose white is 1, so [0, 1] and [-1, 1] both do. No mirroring: "facing right" is part of a name.
    Returns:
      Pictures of the same shape and range; what comes in from outside is white.
    """
    shift_key, zoom_key = jax.random.split(key)
    shift = jax.random.randint(shift_key, (len(images), 2), -max_shift, max_shift + 1).astype(images.dtype)
    zoom = jax.random.uniform(zoom_key, (len(images),), images.dtype, 1 - max_zoom, 1 + max_zoom)
    return jax.vmap(_place)(images, shift, zoom)


def _place(image: Float[Array, "H W C"], shift: Float[Array, "2"], zoom: Float[Array, ""]) -> Float[Array, "H W C"]:
    """`scale_and_translate` fills with zeros, hence the detour over ink = 1 - image, whose zero is white."""
    centre = jnp.array(image.shape[:2]) / 2
    ink = jax.image.scale_and_translate(
        1 - image, image.shape, (0, 1), jnp.stack([zoom, zoom]), centre * (1 - zoom) + shift, method="linear"
    )
    return 1 - ink
