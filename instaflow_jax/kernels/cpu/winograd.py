"""3×3 convolutions of float32 images by fewer products, or by one large one; of large images some rows at a time.

Winograd's algorithms F(m×m, 3×3) (arXiv 1509.09308) make a tile of m×m pixels from sums of its neighbourhood by (m + 2)²
products for each pair of channels, where 9m² were; `models/cpu.py` knows when they pay.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

_TILES = 1024  # of 2×2 pixels, or as much in others, that are made at a time: what lies between stays in the cache


def by_columns(x: Float[Array, "B H W C"], kernel: Float[Array, "3 3 C D"], stride: int = 1) -> Float[Array, "B h w D"]:
    """A 3×3 convolution as one product of the nine shifted images, side by side, and the kernel; h is ⌈H / stride⌉."""
    height, width = x.shape[1:3]
    x = _framed(x)
    columns = [x[:, i : i + height : stride, j : j + width : stride] for i in range(3) for j in range(3)]
    return jnp.concatenate(columns, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])


def winograd(x: Float[Array, "B H W C"], kernel: Float[Array, "3 3 C D"]) -> Float[Array, "B H W D"]:
    """A 3×3 convolution of even-sized images by Winograd's F(2×2, 3×3): 4/9 of the products.

    Strips of rows one after another, since what lies between their products is four times the image.
    """
    return _by_strips(_winograd_strip, 2, x, kernel, _kernel_parts)


def doubled(
    x: Float[Array, "B h w C"],
    kernel: Float[Array, "3 3 C D"],
    bias: Float[Array, "D"],
) -> Float[Array, "B H W D"]:
    """A 3×3 convolution of the image that nearest neighbours double, H = 2h, W = 2w, by a quarter of the products.

    Along a line, with a kernel (a, b, c) whose sum is s, pixels 2i and 2i + 1 become s·x[i] − a·(x[i] − x[i − 1]) and
    s·x[i] + c·(x[i + 1] − x[i]): three products for two pixels, where six were, and the same down the columns. The bias
    is added on the way; after it, that would be another pass over a large image.
    """
    return _by_strips(_doubled_strip, 1, x, kernel, _doubling_parts, bias)


# ---------------------------------------------------------------- strips


def _by_strips(function: Callable, step: int, x, kernel, along: Callable, *others):
    """`function(strip, parts)` of the image x, framed: of all of it, or of some rows of tiles at a time if it is large.

    Args:
      function: makes tiles of 2×2 pixels, [B, step·h + 2, step·w + 2, C] → [B, 2h, 2w, D].
      step: pixels of x that a tile replaces, in each direction.
      along: makes the parts of three numbers in a line; those of the kernel, each [C, D], are made along both its axes.
      others: parts that the function needs beside these.
    """
    whole = _rows(x, step) == x.shape[1]
    framed = _framed(x) if whole else _framed_above_and_below(x)
    parts = [part for row in along(*_when_had(framed, kernel)) for part in along(*row)] + list(others)
    return function(framed, parts) if whole else _in_turn(function, step, x, parts)


def _rows(x, step: int) -> int:
    """Of x, that are taken at a time, where `step` of its pixels become a tile."""
    tiles, width = x.shape[1] // step, x.shape[2] // step
    at_once = _TILES // max(1, step // 2) ** 2
    return step * next(rows for rows in range(max(1, min(tiles, at_once // width)), 0, -1) if tiles % rows == 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _in_turn(function, step, x, parts):
    """`_by_strips` of several. Its gradient is its own: jax's would add to a whole image at each strip."""
    (batch, height, width, depth), D = x.shape, parts[0].shape[-1]
    rows, scale = _rows(x, step), 2 // step
    framed = _framed_above_and_below(x)
    in_place = (
        step == 2 and D == depth
    )  # a strip's result may lie where its first rows were: none of them is wanted again

    def one(i, y):
        strip = function(_strip(y if in_place else framed, rows, i), parts)
        return lax.dynamic_update_slice_in_dim(y, strip, scale * rows * i, 1)

    start = framed if in_place else _to_be_overwritten(framed, batch, scale * height, scale * width, D)
    return lax.fori_loop(0, height // rows, one, start)[:, : scale * height]


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


# XLA's CPU compiler computes what depends on no image as soon as it can: zeros to begin with, and what is made of kernels,
# for all convolutions of a network before its first operation, and keeps it until then. So these ask for a value of theirs.


def _to_be_overwritten(framed, *shape: int):
    """An array of any values, which can only be had when the image can."""
    return jnp.broadcast_to(_value(framed), shape)


def _when_had(framed, kernel):
    """The kernel, which can only be had when the image can: times a 1 that XLA does not know."""
    return kernel * ((lax.stop_gradient(_value(framed)) > 0).astype(jnp.int32) | 1).astype(kernel.dtype)


def _value(framed):
    """One of a framed image's values. XLA would write down the other image too if both were asked for one; and of the frame
    as well, since XLA would see that the other has the value."""
    return framed[0, :2, framed.shape[2] // 2, 0].sum()


def _strip(framed, rows: int, i):
    """The i-th of an image framed above and below: its `rows` and one more on every side."""
    strip = lax.dynamic_slice_in_dim(framed, rows * i, rows + 2, 1)
    return jnp.pad(strip, ((0, 0), (0, 0), (1, 1), (0, 0)))


def _framed_above_and_below(x):
    return jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0)))


def _framed(x):
    """With a row or column of zeros on every side."""
    return jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))


# ---------------------------------------------------------------- what becomes of a strip


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
    middle, above, below = (
        columns(*each)
        for each in ((x[:, 1:-1], *parts[:3], parts[9]), (slope[:, :-1], *parts[3:6]), (slope[:, 1:], *parts[6:9]))
    )
    return _interleaved(
        [[m - a for m, a in zip(middle, above, strict=True)], [m + b for m, b in zip(middle, below, strict=True)]]
    )


def _doubling_parts(a, b, c):
    return a + b + c, a, c


def _winograd_strip(x, U):
    """Rows [B, 2h + 2, 2w + 2, C] by the kernel's sixteen parts [C, D] → [B, 2h, 2w, D]."""
    h, w = x.shape[1] // 2 - 1, x.shape[2] // 2 - 1
    V = [v.reshape(-1, v.shape[-1]) for row in _image_parts(x, 1) for v in _image_parts(row, 2)]
    M = [v @ u for v, u in zip(V, U, strict=True)]
    rows = zip(*(_sums(*M[i : i + 4]) for i in range(0, 16, 4)), strict=True)  # by column of a tile
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


# ---------------------------------------------------------------- tiles of 4×4


def _interpolation(points: Sequence[float]) -> tuple[list, list, list]:
    """The matrices of F(m, 3) from n = m + 1 points and infinity: [n + 1, n + 1], [n + 1, 3] and [m, n + 1].

    They turn a product of polynomials, known by its values at the points, around: m pixels of the pixels d convolved by g
    are result · ((kernel · g) ∘ (image · d)).
    """
    n, m = len(points), len(points) - 1
    image, kernel, result = np.zeros((n + 1, n + 1)), np.zeros((n + 1, 3)), np.zeros((m, n + 1))
    for i, point in enumerate(points):
        others = [other for other in points if other != point]
        image[i, :n] = np.poly(others)[::-1]
        kernel[i] = point ** np.arange(3) / np.prod(np.subtract(point, others))
        result[:, i] = point ** np.arange(m)
    image[n], kernel[n, 2], result[m - 1, n] = np.poly(points)[::-1], 1, 1
    return image.tolist(), kernel.tolist(), result.tolist()


_IMAGE, _KERNEL, _RESULT = _interpolation(
    (0.0, 0.75, -0.75, 1.5, -1.5)
)  # of F(4, 3); 0, ±1, ±2 would round twice as badly


def _sum(weights, terms):
    """Σ weight · term, without those whose weight is known to be 0."""
    return functools.reduce(
        jnp.add, [w * x for w, x in zip(weights, terms, strict=True) if not isinstance(w, float) or w]
    )


@jax.custom_vjp
def winograd_of_fours(x: Float[Array, "B H W C"], kernel: Float[Array, "3 3 C D"]) -> Float[Array, "B H W D"]:
    """A 3×3 convolution of images of multiples of four by F(4×4, 3×3): 1/4 of the products. Its gradient is `winograd`'s.

    Of each strip, sums down the columns come first (`R`, six rows of them for four of pixels); then, for each of the six,
    sums along it, products, and sums of these (`Z`). Loops hold the two apart, or XLA would make R again for each product,
    and compile for seconds; all strips use the same two buffers.
    """
    (batch, height, width, depth), D = x.shape, kernel.shape[-1]
    rows, w = _rows(x, 4), width // 4
    h, in_place = rows // 4, D == depth
    image = jnp.asarray(_IMAGE, x.dtype)
    framed = jnp.pad(x, ((0, 0), (1, 3), (0, 0), (0, 0)))
    U = (np.kron(_KERNEL, _KERNEL).astype(x.dtype) @ _when_had(framed, kernel).reshape(9, -1)).reshape(6, 6, depth, D)

    def one(i, buffers):
        y, R, Z = buffers
        strip = lax.dynamic_slice_in_dim(y if in_place else framed, rows * i, rows + 4, 1)
        strip = jnp.pad(strip, ((0, 0), (0, 0), (1, 3), (0, 0))).reshape(batch, h + 1, 4, -1)
        lines = _six(strip, h, 1)
        R = lax.fori_loop(0, 6, lambda u, R: R.at[u].set(_sum(image[u], lines)), R)

        def along(u, Z):
            columns = _six(R[u].reshape(batch * h, w + 1, 4, depth), w, 1)
            M = [_sum(v, columns).reshape(-1, depth) @ part for v, part in zip(_IMAGE, U[u], strict=True)]
            return Z.at[u].set(jnp.stack([_sum(pixel, M) for pixel in _RESULT], 1))

        Z = lax.fori_loop(0, 6, along, Z)
        sums = list(Z.reshape(6, batch, h, 1, -1))
        strip = jnp.concatenate([_sum(row, sums) for row in _RESULT], 2).reshape(batch, rows, width, D)
        return lax.dynamic_update_slice_in_dim(y, strip, rows * i, 1), R, Z

    y = framed if in_place else _to_be_overwritten(framed, batch, height, width, D)
    R, Z = (
        _to_be_overwritten(framed, *shape) for shape in ((6, batch, h, 4 * (w + 1) * depth), (6, batch * h * w, 4, D))
    )
    return lax.fori_loop(0, height // rows, one, (y, R, Z))[0][:, :height]


winograd_of_fours.defvjp(
    lambda x, kernel: (winograd_of_fours(x, kernel), (x, kernel)),
    lambda saved, slope: jax.vjp(winograd, *saved)[1](slope),
)


def _six(x, count: int, axis: int):
    """Of `count` + 1 fours along an axis, the lines that lie in each six which begins with a four."""
    fours = [lax.index_in_dim(x, i, axis + 1, keepdims=False) for i in range(4)]
    return [lax.slice_in_dim(fours[i % 4], i // 4, count + i // 4, axis=axis) for i in range(6)]
