"""2-D convolutions of NHWC images by HWIO kernels, and the upsampler's enlargement followed by a convolution."""

import functools

import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

from instaflow_jax.arrays import AnyArray
from instaflow_jax.kernels.cpu import convolution as cpu
from instaflow_jax.kernels.cpu.winograd import convolve_doubled


def convolve(x, kernel, window_strides, padding, **options):
    """`lax.conv_general_dilated` as `nnx.Conv` calls it: [B, H, W, C] by [h, w, C, D], neither dilated nor grouped."""
    plain = functools.partial(lax.conv_general_dilated, window_strides=window_strides, padding=padding, **options)
    on_cpu = cpu.faster_way(x, kernel, window_strides, padding)
    return lax.platform_dependent(x, kernel, cpu=on_cpu, default=plain) if on_cpu else plain(x, kernel)


def enlarge_and_convolve(
    x: Float[AnyArray, "B h w C"],
    kernel: Float[AnyArray, "3 3 C D"],
    bias: Float[AnyArray, " D"],
    size: tuple[int, int],
    *,
    kernels: str,
) -> Float[AnyArray, "B H W D"]:
    """Nearest-neighbour enlargement to `size` = (H, W), then a 3×3 convolution with padding 1.

    Args:
      kernels: "auto" avoids making the enlarged image where that is faster; "xla" uses XLA's own convolution.
    """

    def convolve_enlarged(x, kernel, bias, convolve=lax.conv_general_dilated):
        numbers = ("NHWC", "HWIO", "NHWC")
        return convolve(resize_nearest(x, size), kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=numbers) + bias

    if kernels == "xla":
        return convolve_enlarged(x, kernel, bias)
    if size != (2 * x.shape[1], 2 * x.shape[2]) or not cpu.doubling_pays(x, kernel):
        return convolve_enlarged(x, kernel, bias, convolve)
    return lax.platform_dependent(x, kernel, bias, cpu=convolve_doubled, default=convolve_enlarged)


def resize_nearest(x: Float[AnyArray, "B h w C"], size: tuple[int, int]) -> Float[AnyArray, "B H W C"]:
    """Nearest-neighbour enlargement to `size` = (H, W), with torch's rounding (⌊i·in/out⌋)."""
    (h, w), (H, W) = x.shape[1:3], size
    if size == (2 * h, 2 * w):
        x = jnp.broadcast_to(x[:, :, None, :, None, :], (x.shape[0], h, 2, w, 2, x.shape[3]))
        return x.reshape(x.shape[0], H, W, x.shape[-1])
    return x[:, jnp.arange(H) * h // H][:, :, jnp.arange(W) * w // W]
