"""Training a ControlNet: the velocity loss of reflow (Eq. 5) with a frozen U-Net and the outline of each image."""

import types

import jax.numpy as jnp
from jaxtyping import Array, Float

from instaflow_jax.arrays import Image
from instaflow_jax.models import controlnet
from instaflow_jax.train.losses import make_reflow_loss
from instaflow_jax.train.step import Loss


def outline(pixels: Image, threshold: float) -> Float[Array, "B H W 3"]:
    """White lines on black, in [0, 1], where an image in [-1, 1] changes: Sobel's gradient above a threshold.

    Args:
      threshold: share of the gradient at an edge between black and white, in the channel that changes most.
    """
    x = jnp.pad(pixels, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    rows = x[:, :-2] + 2 * x[:, 1:-1] + x[:, 2:]
    columns = x[:, :, :-2] + 2 * x[:, :, 1:-1] + x[:, :, 2:]
    gradient = jnp.hypot(rows[:, :, 2:] - rows[:, :, :-2], columns[:, 2:] - columns[:, :-2]) / 8
    edges = jnp.max(gradient, axis=-1, keepdims=True) > threshold
    return jnp.broadcast_to(edges, pixels.shape).astype(jnp.float32)


def make_control_loss(unet, control, vae, text_encoder, *, threshold: float, **fields) -> Loss:
    """`losses.make_reflow_loss` of a U-Net steered by a ControlNet, which sees the outline of each pair's image.

    Args:
      unet, control, vae, text_encoder: networks; `params` are the ControlNet's, and `frozen` holds the weights of the
        others and "null_ids".
      threshold: see `outline`.
      fields: keywords of `make_reflow_loss`. With a pair's own noise the U-Net knows the image already, so that the
        outline adds nothing; only noise="fresh" teaches the ControlNet to follow it.

    Raises:
      ValueError: see `make_reflow_loss`.
    """
    steered = types.SimpleNamespace(apply=controlnet.make_apply(unet, [control]))
    velocity_loss = make_reflow_loss(steered, text_encoder, **fields)

    def loss(params, frozen, batch, key):
        pixels = vae.apply(frozen["vae"], batch["X1"].astype(jnp.float32), method="decode")
        part = {"params": params, "condition": outline(pixels, threshold), "scale": jnp.ones(())}
        return velocity_loss({"unet": frozen["unet"], "controls": [part]}, frozen, batch, key)

    return loss
