"""Group normalisation that sums over pixels first, then over the channels of a group.

XLA's CPU compiler is more than twice as fast with sums in this order (with gradient), and they round less.
"""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

from instaflow_jax.arrays import AnyArray


def group_norm(
    x: Float[AnyArray, "B *space C"],
    scale: Float[AnyArray, " C"],
    bias: Float[AnyArray, " C"],
    *,
    groups: int,
    epsilon: float,
) -> Float[AnyArray, "B *space C"]:
    """Normalises each group of neighbouring channels over its pixels and channels; computes and returns float32."""
    pixel_axes, channels = tuple(range(1, x.ndim - 1)), x.shape[-1]
    count = math.prod(x.shape[1:-1]) * (channels // groups)
    x = x.astype(jnp.float32)

    def group_mean(y):
        """[B, *space, C] → [B, C]: each channel gets the mean of its group."""
        means = (jnp.sum(y, axis=pixel_axes) / count).reshape(-1, groups, channels // groups).sum(-1, keepdims=True)
        return jnp.broadcast_to(means, (*means.shape[:-1], channels // groups)).reshape(-1, channels)

    mean, square = (group_mean(y) for y in (x, x * x))
    scale = scale * lax.rsqrt(jnp.maximum(square - mean * mean, 0) + epsilon)
    shift = bias - mean * scale
    shape = (-1, *(1,) * len(pixel_axes), channels)
    return x * scale.reshape(shape) + shift.reshape(shape)
