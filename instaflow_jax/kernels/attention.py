"""Multi-head attention. No other module computes it."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

from instaflow_jax.arrays import AnyArray
from instaflow_jax.kernels.cpu import attention as cpu

_CUDNN_DTYPES = (jnp.bfloat16, jnp.float16)
_CUDNN_HEAD_SIZE = 128  # largest; also a multiple of 8


def check_cudnn(dtype) -> None:
    """Checks that cuDNN's fused attention runs on the first device with this compute type.

    Raises:
      ValueError: the type is float32, or the device is not an NVIDIA card of compute capability 8.0 (A100) or newer.
    """
    if dtype not in _CUDNN_DTYPES:
        raise ValueError(
            f"config.attention='cudnn' does not compute in {jnp.dtype(dtype).name}; use --config.dtype=bfloat16 or "
            "--config.attention=xla"
        )
    device = jax.devices()[0]
    capability = str(getattr(device, "compute_capability", ""))  # "9.0" of an H100; AMD's are "gfx90a"
    if device.platform != "gpu" or not capability[:1].isdigit() or float(capability) < 8:
        raise ValueError(
            f"config.attention='cudnn' needs an NVIDIA card of compute capability 8.0 or newer, but the device is "
            f"{device.platform} {device.device_kind}; use --config.attention=xla"
        )


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
      implementation: "xla", or "cudnn" for NVIDIA's fused kernel (bfloat16 or float16 only) where the head size D
        allows it: SD's autoencoder (512) and the innermost heads of SD 1.x's UNet (160) use XLA.
      kernels: "auto", or "xla" for `jax.nn.dot_product_attention` on every platform.
      causal: whether a query sees only the keys up to its own position.
    """
    if q.shape[-1] > _CUDNN_HEAD_SIZE or q.shape[-1] % 8:
        implementation = "xla"
    plain = functools.partial(jax.nn.dot_product_attention, is_causal=causal, implementation=implementation)
    if kernels == "xla" or causal or not cpu.blocks_pay(q):
        return plain(q, k, v)
    return lax.platform_dependent(q, k, v, cpu=cpu.attention_by_blocks, default=plain)
