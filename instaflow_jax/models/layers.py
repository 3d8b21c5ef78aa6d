"""What the networks are made of: convolutions, norms, activations and attention, all NHWC.

`LayerFactory` builds layers that share a compute type and a choice of kernels, so that a block's `__init__` reads like
the reference's. Parameters are always created in float32 and cast where they are used.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Float

from instaflow_jax.arrays import AnyArray
from instaflow_jax.kernels import KERNELS
from instaflow_jax.kernels.attention import ATTENTION, attention
from instaflow_jax.kernels.convolution import convolve
from instaflow_jax.kernels.group_norm import group_norm

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}
REMAT = ("none", "attention", "blocks")
RANDOM_INIT = "random_init"  # marks the parameters that `Net.init` draws; they start as zeros
DEFERRED_INIT = {
    "kernel_init": nnx.initializers.zeros,
    "kernel_metadata": {RANDOM_INIT: True},
}  # for a layer with kernel


class _NoRngs:
    """Stands in for `nnx.Rngs`, which takes seconds to trace; no initializer of ours needs a random key."""

    def params(self) -> None:
        return None


NO_RNGS = _NoRngs()


def activation(name: str) -> Callable:
    """The activation that a config names; ValueError for one that no released model uses."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {name!r} is not one of {sorted(ACTIVATIONS)}")
    return ACTIVATIONS[name]


@dataclasses.dataclass(frozen=True)
class LayerFactory:
    """Builds layers with one compute type and one choice of kernels.

    Attributes:
      dtype: type of matrix products and convolutions; norms and softmax stay in float32.
      attention: "auto" or "xla", see `kernels.attention`.
      kernels: "auto" picks kernels by platform and shape; "xla" uses XLA's convolution and flax's GroupNorm, and
        `jax.nn.dot_product_attention` on every platform.

    Raises:
      ValueError: `attention` or `kernels` has another value.
    """

    dtype: Any = jnp.float32
    attention: str = "auto"
    kernels: str = "auto"

    def __post_init__(self):
        for field, choices in (("attention", ATTENTION), ("kernels", KERNELS)):
            if getattr(self, field) not in choices:
                raise ValueError(f"{field}={getattr(self, field)!r} is not one of {', '.join(choices)}")

    def conv(self, inputs: int, outputs: int, kernel: int, stride: int = 1, padding=0, bias: bool = True) -> nnx.Conv:
        """A square convolution with torch's explicit padding: an int, or ((top, bottom), (left, right))."""
        return nnx.Conv(
            inputs,
            outputs,
            (kernel, kernel),
            stride,
            padding=((padding, padding),) * 2 if isinstance(padding, int) else padding,
            use_bias=bias,
            dtype=self.dtype,
            conv_general_dilated=lax.conv_general_dilated if self.kernels == "xla" else convolve,
            **DEFERRED_INIT,
            rngs=NO_RNGS,
        )

    def linear(self, inputs: int, outputs: int, bias: bool = True) -> nnx.Linear:
        return nnx.Linear(inputs, outputs, use_bias=bias, dtype=self.dtype, **DEFERRED_INIT, rngs=NO_RNGS)

    def embed(self, count: int, features: int) -> nnx.Embed:
        init = {"embedding_init": nnx.initializers.zeros, "embedding_metadata": {RANDOM_INIT: True}}
        return nnx.Embed(count, features, dtype=self.dtype, **init, rngs=NO_RNGS)

    def group_norm(self, channels: int, groups: int, eps: float) -> nnx.GroupNorm:
        norm = nnx.GroupNorm if self.kernels == "xla" else GroupNorm
        return norm(channels, groups, epsilon=eps, dtype=self.dtype, rngs=NO_RNGS)

    def layer_norm(self, features: int, eps: float) -> nnx.LayerNorm:
        return nnx.LayerNorm(features, epsilon=eps, dtype=self.dtype, rngs=NO_RNGS)


class GroupNorm(nnx.GroupNorm):
    """flax's GroupNorm, computed by `kernels.group_norm`."""

    def __call__(self, x):
        scale, bias = self.scale[...], self.bias[...]
        return group_norm(x, scale, bias, groups=self.num_groups, epsilon=self.epsilon).astype(self.dtype)


class Remat(nnx.Module):
    """A part of a network that can recompute its intermediate results in the backward pass to save memory.

    Attributes:
      remat: the values of `Net.with_remat` that make this part recompute.
      recompute: whether it does; set by `Net.with_remat`.
    """

    remat: ClassVar[tuple[str, ...]] = ("blocks",)
    allowed: ClassVar[bool] = True  # see `without_remat`
    recompute = False

    def maybe_checkpoint(self, function: Callable) -> Callable:
        """`function`, wrapped in `jax.checkpoint` if this part recomputes."""
        # A new function each time: jax caches traces by function, and these close over weights of the current trace.
        return jax.checkpoint(lambda *inputs: function(*inputs)) if self.recompute and self.allowed else function


@contextlib.contextmanager
def without_remat() -> Iterator[None]:
    """Inside, no network recomputes anything: for counting the FLOPs of the method alone."""
    Remat.allowed = False
    try:
        yield
    finally:
        Remat.allowed = True


class Identity(nnx.Module):
    """Keeps a place in a list where the reference has a layer without parameters (dropout, ReLU)."""

    def __call__(self, x):
        return x


def attend(
    q: Float[AnyArray, "B L C"],
    k: Float[AnyArray, "B M C"],
    v: Float[AnyArray, "B M C"],
    heads: int,
    implementation: str,
    kernels: str,
    causal: bool = False,
) -> Float[AnyArray, "B L C"]:
    """Multi-head attention, scaled by 1/√(C/heads); see `kernels.attention` for the options."""
    q_heads, k_heads, v_heads = (x.reshape(*x.shape[:2], heads, -1) for x in (q, k, v))
    out = attention(q_heads, k_heads, v_heads, implementation=implementation, kernels=kernels, causal=causal)
    return out.reshape(q.shape)
