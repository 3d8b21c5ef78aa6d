"""Kernel Inception Distance (Bińkowski et al., 2018): unbiased where an FID is not, so of use for few pictures."""

import numpy as np
from jaxtyping import Float


def kid(
    a: Float[np.ndarray, "N D"], b: Float[np.ndarray, "M D"], *, subsets: int = 100, size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Squared maximum mean discrepancy of two sets of features, with the kernel (x·y/D + 1)³.

    Args:
      subsets: random subsets, drawn without replacement from each set.
      size: features of a subset; all there are in the smaller set if it has fewer.
      seed: of the subsets.

    Returns:
      mean and standard deviation over the subsets. Unbiased, so it may be negative where the sets hardly differ.

    Raises:
      ValueError: fewer than two features in a set, or of different widths.
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
    """The unbiased estimate from all of two sets (Gretton et al., 2012, Eq. 3): no feature is compared to itself."""
    return _mean_off_diagonal(_kernel(a, a)) + _mean_off_diagonal(_kernel(b, b)) - 2 * _kernel(a, b).mean()


def _kernel(a, b):
    return (a @ b.T / a.shape[1] + 1) ** 3


def _mean_off_diagonal(k):
    return (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))
