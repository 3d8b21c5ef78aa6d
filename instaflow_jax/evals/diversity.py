"""Diversity within a prompt: how different the images are that one prompt gets from different noise."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from instaflow_jax.evals.retrieval import unit


def diversity(features: Float[np.ndarray, "N D"], prompts: Sequence[str]) -> float:
    """Mean cosine distance between images of the same prompt, each image counted alike.

    Args:
      prompts: that of each image; those of a single image are left out.

    Returns:
      0 if all images of a prompt are one image; NaN if no prompt has two images.
    """
    features, (_, groups) = unit(features), np.unique(list(prompts), return_inverse=True)
    counts, sums = np.bincount(groups), np.zeros((groups.max() + 1, features.shape[1]))
    np.add.at(sums, groups, features)
    several = counts > 1
    n = counts[several]
    similarity = (np.sum(sums[several] ** 2, axis=1) - n) / (n * (n - 1))  # the mean over pairs of different images
    return float(np.average(1 - similarity, weights=n)) if len(n) else float("nan")
