"""Kernel Inception Distance (Bińkowski et al., 2018): unbiased, unlike FID, so it also suits small sets of images."""

import numpy as np
from jaxtyping import Float


def kid(
    a: Float[np.ndarray, "N D"], b: Float[np.ndarray, "M D"], *, subsets: int = 100, size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Squared maximum mean discrepancy of two sets of features, with the kernel (x·y/D + 1)³.

    Args:
      subsets: number of random subsets, drawn without replacement from each set.
      size: features in a subset; at most as many as the smaller set has.
      seed: draws the subsets.

    Returns:
      Mean and standard deviation over the subsets. Being unbiased, the mean may be negative if the sets hardly differ.

    Raises:
      ValueError: a set has fewer than two features, or the widths differ.
    """
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features of shapes {a.shape} and {b.shape} cannot be compared: expected [N, D] and [M, D]")
    size = min(size, len(a), len(b))
    if size < 2:
        raise ValueError(f"a kernel distance needs at least 2 features in each set, got {len(a)} and {len(b)}")
    draw = np.random.default_rng(seed)
    values = [mmd2(*(x[draw.choice(len(x), size, replace=False)] for x in (a, b))) for _ in range(subsets)]
    return float(np.mean(values)), float(np.std(values))


def mmd2(a: Float[np.ndarray, "N D"], b: Float[np.ndarray, "M D"]) -> float:
    """The unbiased estimate from two complete sets (Gretton et al., 2012, Eq. 3); no feature meets itself."""
    return _mean_off_diagonal(_kernel(a, a)) + _mean_off_diagonal(_kernel(b, b)) - 2 * _kernel(a, b).mean()


def _kernel(a, b):
    return (a @ b.T / a.shape[1] + 1) ** 3


def _mean_off_diagonal(k):
    return (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))
