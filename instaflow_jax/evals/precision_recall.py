"""Precision and recall of images (Kynkäänniemi et al., 2019): do they look real, and do they cover the real set?

A set's manifold is the union of balls around its features; each ball reaches to its k-th nearest neighbour in the set.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float

_ROWS = 1000  # features that are compared with all others at a time


def precision_recall(real: Float[np.ndarray, "N D"], made: Float[np.ndarray, "M D"], k: int = 3) -> tuple[float, float]:
    """The share of `made` that lies in the manifold of `real`, and the share of `real` in that of `made`.

    Raises:
      ValueError: a set has k features or fewer, or the widths differ.
    """
    real, made = (np.asarray(x, np.float64) for x in (real, made))
    if real.ndim != 2 or made.ndim != 2 or real.shape[1] != made.shape[1]:
        raise ValueError(
            f"features of shapes {real.shape} and {made.shape} cannot be compared: expected [N, D] and [M, D]"
        )
    if not 1 <= k < min(len(real), len(made)):
        raise ValueError(f"k={k} must be at least 1 and below the features of each set, {len(real)} and {len(made)}")
    return coverage(made, real, radii(real, k)), coverage(real, made, radii(made, k))


def radii(features: Float[np.ndarray, "N D"], k: int) -> Float[np.ndarray, " N"]:
    """Squared distance of each feature to its k-th nearest neighbour."""
    # Column 0 is the feature itself, at distance 0.
    return np.concatenate([np.partition(d, k, axis=1)[:, k] for d in _squared_distances(features, features)])


def coverage(
    points: Float[np.ndarray, "N D"], centres: Float[np.ndarray, "M D"], radii: Float[np.ndarray, " M"]
) -> float:
    """The share of points that lie in at least one ball."""
    return float(np.concatenate([(d <= radii).any(1) for d in _squared_distances(points, centres)]).mean())


def _squared_distances(a, b) -> Iterator[np.ndarray]:
    """Yields [_ROWS, len(b)] at a time. Both sets are centred on b's mean; features far from zero would lose digits."""
    middle = b.mean(0)
    a, b = a - middle, b - middle
    norms = (b**2).sum(1)
    for start in range(0, len(a), _ROWS):
        rows = a[start : start + _ROWS]
        yield np.maximum((rows**2).sum(1)[:, None] + norms - 2 * rows @ b.T, 0)
