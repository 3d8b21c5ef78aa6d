"""Retrieval: among all images and all captions, is the nearest one by cosine the right one?"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float


def unit(x: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N D"]:
    """Rows scaled to length one."""
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def retrieval(similarity: Float[np.ndarray, "N N"], names: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """How often an image's nearest caption, and a caption's nearest image, is the right one.

    Args:
      similarity: [i, j] is that of image i and caption j.
      names: what image i and caption i show, [N] names for each suffix of the results' keys. Equal names count as
        right, so {"": full names, "_toneless": names without skin tone} also counts how often only the tone is wrong.

    Returns:
      `image_to_text` and `text_to_image` with each suffix: shares in [0, 1].
    """
    scores = {}
    for suffix, of_level in names.items():
        own = np.asarray(of_level)
        scores[f"image_to_text{suffix}"] = float(np.mean(own[similarity.argmax(1)] == own))
        scores[f"text_to_image{suffix}"] = float(np.mean(own[similarity.argmax(0)] == own))
    return scores
