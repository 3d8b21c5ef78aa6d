"""Multi-head attention. No other module computes it."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

from instaflow_jax.arrays import AnyArray
from instaflow_jax.kernels.cpu import attention as cpu
from instaflow_jax.kernels.tpu import attention as tpu

ATTENTION = ("auto", "xla")  # choices of the option `attention`
_CUDNN_DTYPES = (jnp.bfloat16, jnp.float16)
_CUDNN_HEAD_SIZE = 128  # largest; also a multiple of 8


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
      implementation: "auto" picks by platform, type, head size and number of tokens: on NVIDIA's cards cuDNN's fused
        kernel, on TPUs a flash kernel for long self-attention, on a CPU blocks of queries for long float32 sequences,
        and XLA's products elsewhere. "xla" is `jax.nn.dot_product_attention` everywhere.
      kernels: "xla" is "xla" for `implementation` too; else "auto".
      causal: whether a query sees only the keys up to its own position.
    """
    plain = functools.partial(jax.nn.dot_product_attention, is_causal=causal, implementation="xla")
    if "xla" in (implementation, kernels):
        return plain(q, k, v)
    by_platform = {}
    if cudnn_runs(q, k):
        by_platform["cuda"] = functools.partial(jax.nn.dot_product_attention, is_causal=causal, implementation="cudnn")
    if not causal and tpu.runs(q, k):
        by_platform["tpu"] = tpu.flash_attention
    if not causal and cpu.blocks_pay(q):
        by_platform["cpu"] = cpu.attention_by_blocks
    return lax.platform_dependent(q, k, v, default=plain, **by_platform) if by_platform else plain(q, k, v)


def cudnn_runs(q, k) -> bool:
    """Whether cuDNN's fused kernel computes queries [B, L, heads, D] and keys [B, M, heads, D], with gradients.

    Not heads of 512 (SD's autoencoder) or 160 (the innermost ones of SD 1.x's UNet), nor an odd number of keys (the 77
    tokens of a prompt).
    """
    size, even = q.shape[-1], q.shape[1] % 2 == k.shape[1] % 2 == 0
    return q.dtype in _CUDNN_DTYPES and size <= _CUDNN_HEAD_SIZE and size % 8 == 0 and even and _has_cudnn()


def _has_cudnn() -> bool:
    """Whether jax's CUDA plugin is installed, without which jax cannot trace cuDNN's kernel, and no card is too old.

    The kernel needs compute capability 8.0 (A100). Where no card is, one that is compiled for is taken to be newer.
    """
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        return False
    cards = [device for device in jax.local_devices() if device.platform == "gpu"]
    return all(float(card.compute_capability) >= 8 for card in cards)
