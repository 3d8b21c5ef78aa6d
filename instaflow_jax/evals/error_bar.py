"""A mean and its error bar."""

import math

import numpy as np
from jaxtyping import Real


def mean_and_error(values: Real[np.ndarray, "..."]) -> tuple[float, float]:
    """The mean of independent samples and the standard error of that mean, in float64.

    Raises:
      ValueError: there are fewer than two samples, or one is not finite.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"values of shape {values.shape}: an error bar needs at least two samples, [n]")
    if not np.isfinite(values).all():
        raise ValueError(f"{int((~np.isfinite(values)).sum())} of {len(values)} samples are not finite")
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))
