"""What the networks are made of: convolutions, norms, activations and ONE attention function, all NHWC.

`Make` builds layers that share a compute type and an attention implementation, so that a block's `__init__` reads
like the reference's. Parameters are always created in float32 and cast where they are used.
"""
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}
ATTENTION = ("xla", "cudnn")
DRAWN = "drawn"  # marks the kernels and embeddings that `Net.init` draws all at once; they start as zeros
_LATER = {"kernel_init": nnx.initializers.zeros, "kernel_metadata": {DRAWN: True}}


def activation(name: str):
    """The activation a config names; ValueError for one the released models never use."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {name!r} is not one of {sorted(ACTIVATIONS)}")
    return ACTIVATIONS[name]


@dataclasses.dataclass(frozen=True)
class Make:
    """Builds layers with one random stream, compute type and attention implementation.

    Attributes:
      rngs: source of the few initial weights that modules draw themselves.
      dtype: type the products are computed in; norms and softmax stay in float32.
      attention: "xla", or "cudnn" for NVIDIA's fused kernel (bf16 or fp16 only).
    """

    rngs: nnx.Rngs
    dtype: Any = jnp.float32
    attention: str = "xla"

    def __post_init__(self):
        if self.attention not in ATTENTION:
            raise ValueError(f"attention={self.attention!r} is not one of {ATTENTION}")

    def conv(self, inputs: int, outputs: int, kernel: int, stride: int = 1, padding=0, bias: bool = True) -> nnx.Conv:
        """A square convolution with torch's explicit padding: an int, or ((top, bottom), (left, right))."""
        pads = ((padding, padding),) * 2 if isinstance(padding, int) else padding
        return nnx.Conv(inputs, outputs, (kernel, kernel), stride, padding=pads, use_bias=bias, dtype=self.dtype,
                        **_LATER, rngs=self.rngs)

    def linear(self, inputs: int, outputs: int, bias: bool = True) -> nnx.Linear:
        return nnx.Linear(inputs, outputs, use_bias=bias, dtype=self.dtype, **_LATER, rngs=self.rngs)

    def embed(self, count: int, features: int) -> nnx.Embed:
        return nnx.Embed(count, features, dtype=self.dtype, embedding_init=nnx.initializers.zeros,
                         embedding_metadata={DRAWN: True}, rngs=self.rngs)

    def group_norm(self, channels: int, groups: int, eps: float) -> nnx.GroupNorm:
        return nnx.GroupNorm(channels, groups, epsilon=eps, dtype=self.dtype, rngs=self.rngs)

    def layer_norm(self, features: int, eps: float) -> nnx.LayerNorm:
        return nnx.LayerNorm(features, epsilon=eps, dtype=self.dtype, rngs=self.rngs)


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

    out = jax.nn.dot_product_attention(split(q), split(k), split(v), is_causal=causal, implementation=implementation)
    return out.reshape(q.shape)


def resize_nearest(x, size: tuple[int, int]):
    """Nearest-neighbour enlargement of [B, H, W, C] to `size`, with torch's rounding (⌊i·in/out⌋)."""
    (h, w), (H, W) = x.shape[1:3], size
    if (H, W) == (2 * h, 2 * w):
        x = jnp.broadcast_to(x[:, :, None, :, None, :], (x.shape[0], h, 2, w, 2, x.shape[3]))
        return x.reshape(x.shape[0], H, W, x.shape[-1])
    return x[:, jnp.arange(H) * h // H][:, :, jnp.arange(W) * w // W]
