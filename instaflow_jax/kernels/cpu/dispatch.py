"""What XLA's CPU compiler does slowly, computed another way there; other platforms get XLA's own operation.

The choice is made from shapes, and from the platform when a program is lowered, so that a program exported for several
keeps all. Results are equal to float32's rounding; `benchmarks/RESULTS.md` tells what each way brings.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from instaflow_jax.kernels.cpu.winograd import by_columns, winograd, winograd_of_fours

_WORTH = 5e8  # FLOP from which on a convolution is worth the longer compilation, up to a quarter of a second each
_FEW_TILES = 128  # with fewer, transforming a kernel that no cache holds costs more than it saves
_LARGE_KERNEL = 2**18  # inputs times outputs from which on no cache holds it
_DEEP = 256  # outputs, and
_LARGE = 2**21  # ... numbers in an image, from which on tiles of 4×4 repay their longer sums
_QUERIES = 256  # that attention takes at a time,
_LONG = 1024  # ... from so many on


# ---------------------------------------------------------------- convolution


def convolve(x, kernel, strides, padding, **options):
    """`lax.conv_general_dilated` as `nnx.Conv` calls it, on [B, H, W, C] and [h, w, C, D]."""
    plain = functools.partial(lax.conv_general_dilated, window_strides=strides, padding=padding, **options)
    other = _other_way(x, kernel, strides, padding)
    return lax.platform_dependent(x, kernel, cpu=other, default=plain) if other else plain(x, kernel)


def _other_way(x, kernel, strides, padding) -> Callable | None:
    size, (inputs, outputs), stride = x.shape[1:3], kernel.shape[2:], strides[0]
    pixels = _pixels(x) // stride**2  # of the result
    by_the_kernel = inputs * outputs >= _LARGE_KERNEL and pixels < _FEW_TILES * 4  # reading it is most of the work
    if x.dtype != jnp.float32 or len(set(strides)) > 1 or not by_the_kernel and 2 * pixels * kernel.size < _WORTH:
        return None
    if kernel.shape[:2] == (1, 1) and stride == 1:
        return lambda x, kernel: x @ kernel[0, 0]
    framed = kernel.shape[:2] == (3, 3) and [tuple(p) for p in padding] == [(1, 1), (1, 1)]
    if by_the_kernel and framed:
        return functools.partial(by_columns, stride=stride)
    if not framed or stride > 1 or min(inputs, outputs) < 32 or any(n % 2 for n in size):
        return None
    of_fours = outputs >= _DEEP and inputs * math.prod(size) >= _LARGE and not any(n % 4 for n in size)
    return winograd_of_fours if of_fours else winograd


def doubling_pays(x, kernel) -> bool:
    """Whether `doubled` is the CPU's way to double these images [B, h, w, C] and convolve them by [3, 3, C, D]."""
    work = 2 * 4 * _pixels(x) * kernel.size
    return x.dtype == jnp.float32 and min(kernel.shape[2:]) >= 32 and work >= _WORTH


def _pixels(x) -> int:
    """Of all images; of one, in an exported program, whose batch is a symbol."""
    batch, *size, _ = x.shape
    return (batch if isinstance(batch, int) else 1) * math.prod(size)


# ---------------------------------------------------------------- attention


def attention(q, k, v, plain: Callable):
    """`plain(q, k, v)`, which is attention without a mask over [B, L, heads, D] and [B, M, heads, D]."""
    if q.dtype != jnp.float32 or q.shape[1] < _LONG or q.shape[1] % _QUERIES:
        return plain(q, k, v)
    return lax.platform_dependent(q, k, v, cpu=in_pieces, default=plain)


def in_pieces(q, k, v):
    """Softmax(q kᵀ / √D) v, one head and `_QUERIES` queries at a time, whose scores stay in the cache."""
    batch, length, heads, width = q.shape
    queries = (q * width**-0.5).reshape(batch, -1, _QUERIES, heads, width)

    def head(inputs):
        queries, k, v = inputs

        def piece(q):
            scores = q @ k
            weights = jnp.exp(scores - lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
            return (weights @ v) / jnp.sum(weights, axis=-1, keepdims=True)

        return lax.map(jax.checkpoint(piece), queries)

    out = lax.map(head, (queries.transpose(3, 1, 0, 2, 4), k.transpose(2, 0, 3, 1), v.transpose(2, 0, 1, 3)))
    return out.transpose(2, 1, 3, 0, 4).reshape(batch, length, heads, width)
