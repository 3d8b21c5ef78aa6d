"""3×3 convolutions of float32 images, padding 1, with fewer products (Lavin & Gray, arXiv 1509.09308).

Both functions make tiles of 2×2 pixels from sums of neighbouring pixels, strip by strip, since the sums of all
tiles take several times the image's memory.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

from instaflow_jax.arrays import AnyArray
from instaflow_jax.kernels.cpu.strips import map_strips


def winograd(x: Float[AnyArray, "B H W C"], kernel: Float[AnyArray, "3 3 C D"]) -> Float[AnyArray, "B H W D"]:
    """A convolution by Winograd's F(2×2, 3×3), with 4/9 of the products; H and W must be even."""
    return map_strips(_winograd_strip, 2, x, kernel, _kernel_transform)


def _winograd_strip(x, U):
    """[B, 2h + 2, 2w + 2, C] and the kernel's sixteen parts [C, D] → [B, 2h, 2w, D]. U, V and M as in the paper."""
    batch, h, w = x.shape[0], x.shape[1] // 2 - 1, x.shape[2] // 2 - 1
    V = [v.reshape(-1, v.shape[-1]) for row in _image_transform(x, 1) for v in _image_transform(row, 2)]
    M = [v @ u for v, u in zip(V, U, strict=True)]
    rows = zip(*(_result_transform(*M[i : i + 4]) for i in range(0, 16, 4)), strict=True)  # by column of a tile
    columns = [_result_transform(*row) for row in rows]
    return _interleave([[columns[j][i].reshape(batch, h, w, -1) for j in range(2)] for i in range(2)])


def _image_transform(x, axis: int):
    """The four lines of each tile; tiles lie two pixels apart."""
    a, b, c, d = (lax.slice_in_dim(x, i, x.shape[axis] - 3 + i, 2, axis) for i in range(4))
    return a - c, b + c, c - b, b - d


def _kernel_transform(a, b, c):
    return a, (a + b + c) / 2, (a - b + c) / 2, c


def _result_transform(a, b, c, d):
    return a + b + c, b - c - d


def convolve_doubled(
    x: Float[AnyArray, "B h w C"], kernel: Float[AnyArray, "3 3 C D"], bias: Float[AnyArray, " D"]
) -> Float[AnyArray, "B H W D"]:
    """Nearest-neighbour enlargement to H = 2h, W = 2w, then a convolution, with a quarter of the products.

    Along a line, with a kernel (a, b, c) whose sum is s, pixels 2i and 2i + 1 become s·x[i] − a·(x[i] − x[i − 1]) and
    s·x[i] + c·(x[i + 1] − x[i]): three products for two pixels instead of six, and the same along columns. Adding the
    bias inside saves one pass over a large image.
    """
    return map_strips(_doubled_strip, 1, x, kernel, _doubling_transform, bias)


def _doubled_strip(x, parts):
    """[B, h + 2, w + 2, C], the kernel's nine parts [C, D] and the bias [D] → [B, 2h, 2w, D]."""

    def double_columns(x, s, a, c, bias=0):
        difference = x[:, :, 1:] - x[:, :, :-1]
        middle = x[:, :, 1:-1] @ s + bias
        return middle - difference[:, :, :-1] @ a, middle + difference[:, :, 1:] @ c

    difference = x[:, 1:] - x[:, :-1]
    middle = double_columns(x[:, 1:-1], *parts[:3], parts[9])
    above = double_columns(difference[:, :-1], *parts[3:6])
    below = double_columns(difference[:, 1:], *parts[6:9])
    upper = [m - a for m, a in zip(middle, above, strict=True)]
    lower = [m + b for m, b in zip(middle, below, strict=True)]
    return _interleave([upper, lower])


def _doubling_transform(a, b, c):
    return a + b + c, a, c


def _interleave(tiles):
    """The pixels [[a, b], [c, d]] of all tiles, each [B, h, w, D] → [B, 2h, 2w, D]."""
    batch, h, w, _ = tiles[0][0].shape
    rows = [jnp.concatenate([pixel.reshape(batch, h, 1, w, 1, -1) for pixel in row], 4) for row in tiles]
    return jnp.concatenate(rows, 2).reshape(batch, 2 * h, 2 * w, -1)
