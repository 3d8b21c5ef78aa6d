"""What the networks are made of: convolutions, norms, activations and ONE attention function, all NHWC.

`Make` builds layers that share a compute type and an attention implementation, so that a block's `__init__` reads
like the reference's. Parameters are always created in float32 and cast where they are used.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from instaflow_jax.kernels.cpu import dispatch as cpu

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}
ATTENTION = ("xla", "cudnn")
REMAT = ("none", "attention", "blocks")
RANDOM_INIT = "drawn"  # marks the parameters that `Net.init` draws all at once; they start as zeros
DEFERRED_INIT = {
    "kernel_init": nnx.initializers.zeros,
    "kernel_metadata": {RANDOM_INIT: True},
}  # for a convolution or linear layer


class _NoRngs:
    """Where flax's layers ask for a random key, though no initializer of ours needs one: nnx.Rngs takes seconds to trace."""

    def params(self) -> None:
        return None


NO_RNGS = _NoRngs()


def activation(name: str):
    """The activation a config names; ValueError for one the released models never use."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {name!r} is not one of {sorted(ACTIVATIONS)}")
    return ACTIVATIONS[name]


@dataclasses.dataclass(frozen=True)
class LayerFactory:
    """Builds layers with one compute type and attention implementation.

    Attributes:
      dtype: type the products are computed in; norms and softmax stay in float32.
      attention: "xla", or "cudnn" for NVIDIA's fused kernel (bf16 or fp16 only).
    """

    dtype: Any = jnp.float32
    attention: str = "xla"

    def __post_init__(self):
        if self.attention not in ATTENTION:
            raise ValueError(f"attention={self.attention!r} is not one of {ATTENTION}")

    def conv(self, inputs: int, outputs: int, kernel: int, stride: int = 1, padding=0, bias: bool = True) -> "Conv":
        """A square convolution with torch's explicit padding: an int, or ((top, bottom), (left, right))."""
        pads = ((padding, padding),) * 2 if isinstance(padding, int) else padding
        return Conv(
            inputs,
            outputs,
            (kernel, kernel),
            stride,
            padding=pads,
            use_bias=bias,
            dtype=self.dtype,
            conv_general_dilated=cpu.convolve,
            **DEFERRED_INIT,
            rngs=NO_RNGS,
        )

    def linear(self, inputs: int, outputs: int, bias: bool = True) -> nnx.Linear:
        return nnx.Linear(inputs, outputs, use_bias=bias, dtype=self.dtype, **DEFERRED_INIT, rngs=NO_RNGS)

    def embed(self, count: int, features: int) -> nnx.Embed:
        return nnx.Embed(
            count,
            features,
            dtype=self.dtype,
            embedding_init=nnx.initializers.zeros,
            embedding_metadata={RANDOM_INIT: True},
            rngs=NO_RNGS,
        )

    def group_norm(self, channels: int, groups: int, eps: float) -> "GroupNorm":
        return GroupNorm(channels, groups, epsilon=eps, dtype=self.dtype, rngs=NO_RNGS)

    def layer_norm(self, features: int, eps: float) -> nnx.LayerNorm:
        return nnx.LayerNorm(features, epsilon=eps, dtype=self.dtype, rngs=NO_RNGS)


class Conv(nnx.Conv):
    """flax's; one of 3×3, padding 1 and stride 1 can also convolve an enlarged image, which need not be made then."""

    def enlarged(self, x, size: tuple[int, int]):
        """[B, h, w, C], enlarged to `size` by nearest neighbours and convolved: [B, *size, D]."""
        kernel, bias = self.kernel[...].astype(self.dtype), self.bias[...].astype(self.dtype)
        if size != (2 * x.shape[1], 2 * x.shape[2]) or not cpu.doubling_pays(x, kernel):
            return self(resize_nearest(x, size))

        def plain(x, kernel, bias):
            return bias + lax.conv_general_dilated(
                resize_nearest(x, size), kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
            )

        return lax.platform_dependent(x, kernel, bias, cpu=cpu.doubled, default=plain)


class GroupNorm(nnx.GroupNorm):
    """flax's, but for the order of its sums: over pixels first, then over the channels of a group.

    XLA's CPU compiler is more than twice as fast at these (with gradient), and their rounding is smaller.
    """

    def __call__(self, x):
        count = math.prod(x.shape[1:-1]) * self.group_size
        wide = x.astype(jnp.float32)
        mean, square = (
            self._over_groups(jnp.sum(y, axis=tuple(range(1, x.ndim - 1))) / count) for y in (wide, wide * wide)
        )
        scale = self.scale[...] * lax.rsqrt(jnp.maximum(square - mean * mean, 0) + self.epsilon)
        shift = self.bias[...] - mean * scale
        shape = (-1, *(1,) * (x.ndim - 2), x.shape[-1])
        return (wide * scale.reshape(shape) + shift.reshape(shape)).astype(self.dtype)

    def _over_groups(self, x):
        """[B, C] → [B, C], each channel with its group's sum."""
        sums = x.reshape(-1, self.num_groups, self.group_size).sum(-1, keepdims=True)
        return jnp.broadcast_to(sums, (*sums.shape[:-1], self.group_size)).reshape(-1, x.shape[-1])


class Remat(nnx.Module):
    """A part of a network that may compute again in the backward pass what it would otherwise keep in memory.

    Attributes:
      remat: the choices of `Net.with_remat` that this part answers to.
      recompute: whether one of them was made; set by `Net.with_remat`.
    """

    remat: ClassVar[tuple[str, ...]] = ("blocks",)
    recompute = False

    def maybe_checkpoint(self, function: Callable) -> Callable:
        """`function`, of which the backward pass keeps inputs and weights only, where this part is to recompute."""
        # A new function each time: jax remembers traces by function, and these close over the trace's own weights.
        return jax.checkpoint(lambda *inputs: function(*inputs)) if self.recompute else function


class Identity(nnx.Module):
    """Keeps a place in a list whose reference has a layer without parameters there (dropout, ReLU)."""

    def __call__(self, x):
        return x


def attend(q, k, v, heads: int, implementation: str, causal: bool = False):
    """Multi-head attention over tokens: q [B, L, C], k and v [B, M, C] → [B, L, C], scaled by 1/√(C/heads).

    The only place where attention is computed. Softmax runs in float32.
    """

    def split(x):
        return x.reshape(*x.shape[:2], heads, -1)

    plain = functools.partial(jax.nn.dot_product_attention, is_causal=causal, implementation=implementation)
    out = (plain if causal else functools.partial(cpu.attention, plain=plain))(split(q), split(k), split(v))
    return out.reshape(q.shape)


def resize_nearest(x, size: tuple[int, int]):
    """Nearest-neighbour enlargement of [B, H, W, C] to `size`, with torch's rounding (⌊i·in/out⌋)."""
    (h, w), (H, W) = x.shape[1:3], size
    if (H, W) == (2 * h, 2 * w):
        x = jnp.broadcast_to(x[:, :, None, :, None, :], (x.shape[0], h, 2, w, 2, x.shape[3]))
        return x.reshape(x.shape[0], H, W, x.shape[-1])
    return x[:, jnp.arange(H) * h // H][:, :, jnp.arange(W) * w // W]
