"""Maps a function over strips of an image's rows, so that intermediate results stay in the CPU's cache.

A tile is 2×2 pixels of the result. It comes from `step`×`step` pixels of the image and a border of one pixel.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

MAX_TILES = 1024  # tiles per strip


def map_strips(function: Callable, step: int, x, kernel, transform: Callable, *more_parts):
    """`function(strip, parts)` over the strips of x [B, H, W, C] → [B, 2H/step, 2W/step, D]; zeros surround the image.

    Args:
      function: makes tiles from a strip with its border, [B, step·h + 2, step·w + 2, C] → [B, 2h, 2w, D]. It must be
        hashable.
      step: 1 or 2, and a divisor of H and W.
      kernel: [3, 3, C, D].
      transform: maps the three numbers of a line to a tuple; applied along both axes of the kernel, it makes `parts`,
        each [C, D].
      more_parts: arrays to append to `parts`.
    """
    one_strip = _rows(x, step) == x.shape[1]
    padded = pad_all_sides(x) if one_strip else _pad_rows(x)
    parts = [part for row in transform(*_depend_on(padded, kernel)) for part in transform(*row)] + list(more_parts)
    return function(padded, parts) if one_strip else _loop(function, step, x, parts)


def _rows(x, step: int) -> int:
    """Number of input rows per strip: as many as `MAX_TILES` allows, in strips of equal height."""
    tile_rows, tile_columns = x.shape[1] // step, x.shape[2] // step
    most = max(1, min(tile_rows, MAX_TILES // tile_columns))
    return step * next(rows for rows in range(most, 0, -1) if tile_rows % rows == 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _loop(function: Callable, step: int, x, parts: Sequence):
    """`map_strips` of several strips. jax's own gradient would add to an array of the image's size for each strip."""
    (batch, height, width, channels), outputs = x.shape, parts[0].shape[-1]
    rows, scale = _rows(x, step), 2 // step
    padded = _pad_rows(x)
    # A strip's result may overwrite the strip's own first rows, since no later strip reads them.
    in_place = step == 2 and outputs == channels

    def one(i, y):
        result = function(_strip(y if in_place else padded, rows, i), parts)
        return lax.dynamic_update_slice_in_dim(y, result, scale * rows * i, 1)

    start = padded if in_place else _scratch(padded, (batch, scale * height, scale * width, outputs))
    return lax.fori_loop(0, height // rows, one, start)[:, : scale * height]


def _loop_forward(function, step, x, parts):
    return _loop(function, step, x, parts), (x, parts)


def _loop_backward(function, step, saved, cotangent):
    x, parts = saved
    rows, scale = _rows(x, step), 2 // step
    padded = _pad_rows(x)

    def one(i, sums):
        x_sum, parts_sum = sums
        _, vjp = jax.vjp(function, _strip(padded, rows, i), parts)
        d_strip, d_parts = vjp(lax.dynamic_slice_in_dim(cotangent, scale * rows * i, scale * rows, 1))
        before = lax.dynamic_slice_in_dim(x_sum, rows * i, rows + 2, 1)
        x_sum = lax.dynamic_update_slice_in_dim(x_sum, before + d_strip[:, :, 1:-1], rows * i, 1)
        return x_sum, jax.tree.map(jnp.add, parts_sum, d_parts)

    zeros = jax.tree.map(jnp.zeros_like, (padded, parts))
    d_padded, d_parts = lax.fori_loop(0, x.shape[1] // rows, one, zeros)
    return d_padded[:, 1:-1], d_parts


_loop.defvjp(_loop_forward, _loop_backward)


def _strip(padded, rows: int, i):
    """Strip i of an image padded above and below: `rows` rows, and a border of one pixel on every side."""
    return _pad_columns(lax.dynamic_slice_in_dim(padded, rows * i, rows + 2, 1))


def _pad_rows(x):
    return jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0)))


def _pad_columns(x):
    return jnp.pad(x, ((0, 0), (0, 0), (1, 1), (0, 0)))


def pad_all_sides(x):
    """[B, H, W, C] → [B, H + 2, W + 2, C], with zeros around each image."""
    return jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))


# XLA:CPU schedules operations without data dependencies first, so the scratch buffers and transformed kernels of all
# layers would be live at once. These helpers add a dependency on the image to delay them.


def _scratch(padded, shape: tuple[int, ...]):
    """An array to be overwritten."""
    return jnp.broadcast_to(_any_value(padded), shape)


def _depend_on(padded, kernel):
    """The kernel times a 1 that depends on the image; XLA cannot simplify it."""
    return kernel * ((lax.stop_gradient(_any_value(padded)) > 0).astype(jnp.int32) | 1).astype(kernel.dtype)


def _any_value(padded):
    """A value of the padded image: the sum of a border pixel and of the pixel below it.

    Reading the image before padding would make XLA store that too. Without the border pixel, XLA would see that the
    value is one of the image before padding.
    """
    return padded[0, :2, padded.shape[2] // 2, 0].sum()
