"""Which convolution is the fastest on a CPU, by the shapes of image and kernel."""

import functools
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Float

from instaflow_jax.arrays import AnyArray
from instaflow_jax.kernels.cpu.strips import pad_all_sides
from instaflow_jax.kernels.cpu.winograd import winograd

MIN_FLOPS = 5e8  # smaller convolutions do not repay the longer compilation, up to a quarter of a second each
MIN_CHANNELS = 32  # inputs and outputs; with fewer, Winograd's sums cost more than the products they save
MIN_TILES = 128  # with fewer tiles of 2×2 pixels, transforming a large kernel costs more than it saves
LARGE_KERNEL = 2**18  # inputs × outputs above which a kernel does not fit in the cache


def faster_way(x, kernel, strides, padding) -> Callable | None:
    """The function (x, kernel) → result that beats XLA's convolution of [B, H, W, C] by [h, w, C, D], or None."""
    (inputs, outputs), stride, pads = kernel.shape[2:], strides[0], {tuple(pad) for pad in padding}
    output_pixels = _pixels(x) // stride**2
    memory_bound = (
        inputs * outputs >= LARGE_KERNEL and output_pixels < 4 * MIN_TILES
    )  # reads the kernel most of the time
    if x.dtype != jnp.float32 or len(set(strides)) > 1:
        return None
    if not memory_bound and 2 * output_pixels * kernel.size < MIN_FLOPS:
        return None
    if kernel.shape[:2] == (1, 1) and pads == {(0, 0)} and stride == 1:
        return by_pixels
    if kernel.shape[:2] != (3, 3) or pads != {(1, 1)}:
        return None
    if memory_bound:
        return functools.partial(by_columns, stride=stride)
    even = x.shape[1] % 2 == x.shape[2] % 2 == 0
    return winograd if stride == 1 and even and min(inputs, outputs) >= MIN_CHANNELS else None


def doubling_pays(x, kernel) -> bool:
    """Whether `convolve_doubled` is the CPU's way to enlarge [B, h, w, C] twofold and convolve it by [3, 3, C, D]."""
    flops = 2 * 4 * _pixels(x) * kernel.size
    return x.dtype == jnp.float32 and min(kernel.shape[2:]) >= MIN_CHANNELS and flops >= MIN_FLOPS


def _pixels(x) -> int:
    """Number of pixels in the batch; in one image where the batch is symbolic (exported programs)."""
    batch, height, width, _ = x.shape
    return (batch if isinstance(batch, int) else 1) * height * width


def by_pixels(x: Float[AnyArray, "B H W C"], kernel: Float[AnyArray, "1 1 C D"]) -> Float[AnyArray, "B H W D"]:
    """A 1×1 convolution as one matrix product."""
    return x @ kernel[0, 0]


def by_columns(
    x: Float[AnyArray, "B H W C"], kernel: Float[AnyArray, "3 3 C D"], stride: int = 1
) -> Float[AnyArray, "B h w D"]:
    """A 3×3 convolution, padding 1, as one product of the kernel and nine shifted images; h = ⌈H / stride⌉."""
    height, width = x.shape[1:3]
    x = pad_all_sides(x)
    columns = [x[:, i : i + height : stride, j : j + width : stride] for i in range(3) for j in range(3)]
    return jnp.concatenate(columns, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])
