"""S, how far a flow's roads are from straight, as one number with its error bar; `flow.straightness` measures it."""

import math

import numpy as np
from jaxtyping import Float


def summary(S: Float[np.ndarray, " n"]) -> tuple[float, float]:
    """Mean of S over samples (per latent dimension, from `flow.straightness`) and the standard error of that mean.

    Raises:
      ValueError: fewer than two samples, or one that is not finite.
    """
    S = np.asarray(S, np.float64)
    if S.ndim != 1 or len(S) < 2:
        raise ValueError(f"S of shape {S.shape}: an error bar needs at least two samples, [n]")
    if not np.isfinite(S).all():
        raise ValueError(f"S of {int((~np.isfinite(S)).sum())} of {len(S)} samples is not finite")
    return float(S.mean()), float(S.std(ddof=1) / math.sqrt(len(S)))
