"""What the four networks of the embedded world have in common."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np

from instaflow_jax import pipeline
from instaflow_jax.arrays import Key, Params
from instaflow_jax.data.openmoji.dataset import Arrays
from instaflow_jax.stages.common.fit import Evaluate
from instaflow_jax.train.step import Loss
from instaflow_jax.weights.tokenizer import Tokenizer

LoadSplit = Callable[[str], Arrays]  # "train", "heldout" or "all" → its emoji


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How one network is trained.

    Attributes:
      init: draws initial parameters from a key.
      loss: from `pretrain.losses`.
      arrays: the training data in memory, one row per example.
      evaluate: see `Evaluate`; runs on the running mean.
      export: (parameters, directory) writes the network as PyTorch diffusers and transformers read it.
    """

    init: Callable[[Key], Params]
    loss: Loss
    arrays: dict[str, np.ndarray]
    evaluate: Evaluate
    export: Callable[[Params, Path], None]


def embedded_tokenizer() -> Tokenizer:
    """The tokenizer that all embedded networks share."""
    return Tokenizer.from_pretrained(pipeline.locate("openmoji"))
