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
from jaxtyping import Array, Float

_WORTH = 5e8  # FLOP from which on a convolution is worth the longer compilation, up to a quarter of a second each
_TILES = 1024  # of 2×2 pixels that are made at a time: what lies between stays in the cache
_FEW_TILES = 128  # with fewer, transforming a kernel that no cache holds costs more than it saves
_LARGE_KERNEL = 2**18  # inputs times outputs from which on no cache holds it
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
    return winograd if framed and stride == 1 and min(inputs, outputs) >= 32 and not (size[0] % 2 or size[1] % 2) else None


def doubling_pays(x, kernel) -> bool:
    """Whether `doubled` is the CPU's way to double these images [B, h, w, C] and convolve them by [3, 3, C, D]."""
    work = 2 * 4 * _pixels(x) * kernel.size
    return x.dtype == jnp.float32 and min(kernel.shape[2:]) >= 32 and work >= _WORTH


def _pixels(x) -> int:
    """Of all images; of one, in an exported program, whose batch is a symbol."""
    batch, *size, _ = x.shape
    return (batch if isinstance(batch, int) else 1) * math.prod(size)


def by_columns(x: Float[Array, "B H W C"], kernel: Float[Array, "3 3 C D"], stride: int = 1) -> Float[Array, "B h w D"]:
    """A 3×3 convolution as one product of the nine shifted images, side by side, and the kernel; h is ⌈H / stride⌉."""
    height, width = x.shape[1:3]
    x = _framed(x)
    columns = [x[:, i:i + height:stride, j:j + width:stride] for i in range(3) for j in range(3)]
    return jnp.concatenate(columns, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])


def winograd(x: Float[Array, "B H W C"], kernel: Float[Array, "3 3 C D"]) -> Float[Array, "B H W D"]:
    """A 3×3 convolution of even-sized images by Winograd's F(2×2, 3×3) (arXiv 1509.09308): 4/9 of the products.

    Strips of rows one after another, since what lies between their products is four times the image.
    """
    return _by_strips(_winograd_strip, 2, x, [u for row in _kernel_parts(*kernel) for u in _kernel_parts(*row)])


def doubled(x: Float[Array, "B h w C"], kernel: Float[Array, "3 3 C D"], bias: Float[Array, "D"]) -> Float[Array, "B H W D"]:
    """A 3×3 convolution of the image that nearest neighbours double, H = 2h, W = 2w, by a quarter of the products.

    With the bias, which would be a pass over a large image of its own.

    Along a line, with a kernel (a, b, c) whose sum is s, pixels 2i and 2i + 1 become s·x[i] − a·(x[i] − x[i − 1]) and
    s·x[i] + c·(x[i + 1] − x[i]): three products for two pixels, where six were, and the same down the columns.
    """
    parts = [part for row in _doubling_parts(*kernel) for part in _doubling_parts(*row)]
    return _by_strips(_doubled_strip, 1, x, [*parts, bias])


def _by_strips(function: Callable, step: int, x, parts: list):
    """`function(strip, parts)` of the image x, framed: of all of it, or of some rows of tiles at a time if it is large.

    Args:
      function: makes tiles of 2×2 pixels, [B, step·h + 2, step·w + 2, C] → [B, 2h, 2w, D].
      step: pixels of x that a tile replaces, in each direction.
      parts: of the kernel, each [C, D], and what else it needs.
    """
    if _rows(x, step) == x.shape[1]:
        return function(_framed(x), parts)
    return _in_turn(function, step, x, parts)


def _rows(x, step: int) -> int:
    """Of x, that are taken at a time."""
    tiles, width = x.shape[1] // step, x.shape[2] // step
    return step * next(rows for rows in range(max(1, min(tiles, _TILES // width)), 0, -1) if tiles % rows == 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _in_turn(function, step, x, parts):
    """`_by_strips` of several. Its gradient is its own: jax's would add to a whole image at each strip."""
    (batch, height, width, depth), D = x.shape, parts[0].shape[-1]
    rows, scale = _rows(x, step), 2 // step
    framed = _framed_above_and_below(x)
    in_place = step == 2 and D == depth  # a strip's result may lie where its first rows were: none of them is wanted again

    def one(i, y):
        strip = function(_strip(y if in_place else framed, rows, i), parts)
        return lax.dynamic_update_slice_in_dim(y, strip, scale * rows * i, 1)

    # Every row will be overwritten. Zeros would be made, and kept, for all convolutions of a network before its first
    # operation; a value of the image can only be had when its turn comes. Of the framed one, lest XLA, asked for x twice,
    # write down both; of its frame too, lest XLA see that x has it.
    start = framed if in_place else jnp.broadcast_to(framed[0, :2, 0, 0].sum(), (batch, scale * height, scale * width, D))
    return lax.fori_loop(0, height // rows, one, start)[:, :scale * height]


def _in_turn_forward(function, step, x, parts):
    return _in_turn(function, step, x, parts), (x, parts)


def _in_turn_backward(function, step, saved, slope):
    x, parts = saved
    height, rows, scale = x.shape[1], _rows(x, step), 2 // step
    framed = _framed_above_and_below(x)

    def one(i, sums):
        _, back = jax.vjp(function, _strip(framed, rows, i), parts)
        of_strip, of_parts = back(lax.dynamic_slice_in_dim(slope, scale * rows * i, scale * rows, 1))
        before = lax.dynamic_slice_in_dim(sums[0], rows * i, rows + 2, 1)
        of_x = lax.dynamic_update_slice_in_dim(sums[0], before + of_strip[:, :, 1:-1], rows * i, 1)
        return of_x, jax.tree.map(jnp.add, sums[1], of_parts)

    of_x, of_parts = lax.fori_loop(0, height // rows, one, jax.tree.map(jnp.zeros_like, (framed, parts)))
    return of_x[:, 1:-1], of_parts


_in_turn.defvjp(_in_turn_forward, _in_turn_backward)


def _strip(framed, rows: int, i):
    """The i-th of an image framed above and below: its `rows` and one more on every side."""
    strip = lax.dynamic_slice_in_dim(framed, rows * i, rows + 2, 1)
    return jnp.pad(strip, ((0, 0), (0, 0), (1, 1), (0, 0)))


def _framed_above_and_below(x):
    return jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0)))


def _framed(x):
    """With a row or column of zeros on every side."""
    return jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))


def _interleaved(tiles):
    """[[a, b], [c, d]], each [B, h, w, D], as tiles of 2×2 pixels: [B, 2h, 2w, D]."""
    batch, h, w, _ = tiles[0][0].shape
    rows = [jnp.concatenate([pixel.reshape(batch, h, 1, w, 1, -1) for pixel in row], 4) for row in tiles]
    return jnp.concatenate(rows, 2).reshape(batch, 2 * h, 2 * w, -1)


def _doubled_strip(x, parts):
    """Rows [B, h + 2, w + 2, C] by the kernel's nine parts [C, D], plus the bias [D] → [B, 2h, 2w, D]."""
    def columns(x, s, a, c, bias=0):
        slope = x[:, :, 1:] - x[:, :, :-1]
        middle = x[:, :, 1:-1] @ s + bias
        return middle - slope[:, :, :-1] @ a, middle + slope[:, :, 1:] @ c

    slope = x[:, 1:] - x[:, :-1]
    middle, above, below = (columns(*each) for each in (
        (x[:, 1:-1], *parts[:3], parts[9]), (slope[:, :-1], *parts[3:6]), (slope[:, 1:], *parts[6:9])))
    return _interleaved([[m - a for m, a in zip(middle, above, strict=True)],
                         [m + b for m, b in zip(middle, below, strict=True)]])


def _doubling_parts(a, b, c):
    return a + b + c, a, c


def _winograd_strip(x, U):
    """Rows [B, 2h + 2, 2w + 2, C] by the kernel's sixteen parts [C, D] → [B, 2h, 2w, D]."""
    h, w = x.shape[1] // 2 - 1, x.shape[2] // 2 - 1
    V = [v.reshape(-1, v.shape[-1]) for row in _image_parts(x, 1) for v in _image_parts(row, 2)]
    M = [v @ u for v, u in zip(V, U, strict=True)]
    rows = zip(*(_sums(*M[i:i + 4]) for i in range(0, 16, 4)), strict=True)  # by column of a tile
    columns = [_sums(*row) for row in rows]
    return _interleaved([[columns[j][i].reshape(x.shape[0], h, w, -1) for j in range(2)] for i in range(2)])


def _image_parts(x, axis: int):
    """The four lines of each tile, two apart, in Winograd's basis."""
    a, b, c, d = (lax.slice_in_dim(x, i, x.shape[axis] - 3 + i, 2, axis) for i in range(4))
    return a - c, b + c, c - b, b - d


def _kernel_parts(a, b, c):
    return a, (a + b + c) / 2, (a - b + c) / 2, c


def _sums(a, b, c, d):
    return a + b + c, b - c - d


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
