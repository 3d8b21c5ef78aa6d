"""What the four networks of the embedded world have in common: their data, and what the loop needs to train one."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8
from ml_collections import ConfigDict

from instaflow_jax import pipeline
from instaflow_jax.arrays import Key, Params
from instaflow_jax.data.openmoji import dataset as openmoji
from instaflow_jax.data.openmoji.augment import augment
from instaflow_jax.data.openmoji.captions import Emoji, caption_table
from instaflow_jax.stages.pretrain.losses import Augment
from instaflow_jax.train.step import Loss
from instaflow_jax.weights.tokenizer import Tokenizer

TOKENIZER = "openmoji"  # the embedded model whose tokenizer all of them use


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One network to be trained.

    Attributes:
      init: fresh parameters from a key.
      loss: see `train.pretraining`.
      arrays: the data in memory, a row an example.
      watch: (parameters, PNG file to write) → numbers to log; run now and then on the running mean.
      export: (parameters, directory) writes the network as PyTorch diffusers and transformers read it.
    """

    init: Callable[[Key], Params]
    loss: Loss
    arrays: dict[str, np.ndarray]
    watch: Callable[[Params, Path], dict[str, float]]
    export: Callable[[Params, Path], None]


def load(config: ConfigDict, workdir: str, split: str) -> openmoji.Arrays:
    """The emoji of a split, drawn on first use into `config.data_dir`, or `workdir`/data where that is empty."""
    return openmoji.load(config.data_dir or Path(workdir) / "data", config.size, split)


def tokenizer() -> Tokenizer:
    return Tokenizer.from_pretrained(pipeline.locate(TOKENIZER))


def caption_tokens(emoji: list[Emoji]) -> Int[np.ndarray, "N K L"]:
    """Token ids of each emoji's caption at each of the K caption levels."""
    texts, index = caption_table(emoji)
    return np.asarray(tokenizer()(texts), np.int32)[index]


def make_augment(config: ConfigDict) -> Augment:
    """Small shifts and scalings, `config.augment`."""
    return functools.partial(augment, **config.augment)


def to_pixels(images: UInt8[np.ndarray, "N H W 3"]) -> np.ndarray:
    """Bytes to [-1, 1], on the host."""
    return images.astype(np.float32) / 127.5 - 1


def in_batches(function: Callable, size: int, *arrays: np.ndarray) -> np.ndarray:
    """function(*rows) for `size` rows at a time, the last batch filled up with its first row, so that it compiles once."""
    outputs = []
    for start in range(0, len(arrays[0]), size):
        rows = [a[start : start + size] for a in arrays]
        count = len(rows[0])
        rows = [np.concatenate([r, np.repeat(r[:1], size - count, 0)]) for r in rows]
        outputs.append(np.asarray(function(*rows))[:count])
    return np.concatenate(outputs)
