"""Multi-head attention. No other module computes it."""

import functools

import jax
from jax import lax
from jaxtyping import Float

from instaflow_jax.arrays import AnyArray
from instaflow_jax.kernels.cpu import attention as cpu


def attention(
    q: Float[AnyArray, "B L heads D"],
    k: Float[AnyArray, "B M heads D"],
    v: Float[AnyArray, "B M heads D"],
    *,
    implementation: str,
    kernels: str,
    causal: bool = False,
) -> Float[AnyArray, "B L heads D"]:
    """softmax(q kᵀ / √D) v, with the softmax in float32.

    Args:
      implementation: "xla", or "cudnn" for NVIDIA's fused kernel (bfloat16 or float16 only).
      kernels: "auto", or "xla" for `jax.nn.dot_product_attention` on every platform.
      causal: whether a query sees only the keys up to its own position.
    """
    plain = functools.partial(jax.nn.dot_product_attention, is_causal=causal, implementation=implementation)
    if kernels == "xla" or causal or not cpu.blocks_pay(q):
        return plain(q, k, v)
    return lax.platform_dependent(q, k, v, cpu=cpu.attention_by_blocks, default=plain)
