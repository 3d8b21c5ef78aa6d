"""Where prompts come from: each source yields its rows in order, and None for a row that is not a text."""

import codecs
import glob
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from instaflow_jax.data import records
from instaflow_jax.data.openmoji.captions import KINDS_WEIGHTS, WEIGHTS, draw
from instaflow_jax.data.openmoji.drawing import catalogue
from instaflow_jax.infra import stores

Rows = Iterator[str | None]
OPENMOJI = {"openmoji": WEIGHTS, "openmoji_kinds": KINDS_WEIGHTS}  # sources, and how often they draw each level
_REPEATS_WITHOUT_TONE = 3  # half of all emoji have a skin tone; this keeps them from dominating


def openmoji(source: str, count: int, seed: int) -> Rows:
    """Captions as in the embedded teacher's training: shuffled passes over all emoji, random levels, none empty.

    With the source "openmoji_kinds" a quarter of them names only a kind.

    Caption i depends on (seed, i) alone. Needs the names of the emoji (package `emoji`), not their images.

    Raises:
      ValueError: count is not positive, or the package is not installed.
    """
    if count < 1:
        raise ValueError(
            f"count={count} is not positive; prompts.source={source!r} has no end and needs the number of prompts"
        )
    try:
        known, _ = catalogue()
    except ModuleNotFoundError as error:
        raise ValueError(
            f"prompts.source={source!r} needs the package 'emoji'; use pip install -e '.[demo]', or a file of prompts"
        ) from error
    deck = [e for e in known for _ in range(1 if e.skin_tone else _REPEATS_WITHOUT_TONE)]
    for start in range(0, count, len(deck)):
        order = np.random.default_rng([seed, start]).permutation(len(deck))
        for i, card in enumerate(order[: count - start], start):
            yield draw(deck[card], seed, i, empty=0.0, weights=OPENMOJI[source])


def need_column(source: str, column: str) -> str:
    """Returns `column`. Raises ValueError if it is empty."""
    if not column:
        raise ValueError(f"prompts.source={source!r} needs prompts.column, the name of the column with the text")
    return column


# ---------------------------------------------------------------- files


def files(source: str, column: str) -> Rows:
    """The rows of one file, or of all files that match a glob; the file extension decides the format.

    Raises:
      ValueError: unknown extension, a file that does not have the format of its extension, or a missing column.
      FileNotFoundError: no such file.
    """
    path = stores.local(source)
    if path.suffix not in _READERS:
        raise ValueError(
            f"prompts.source={source!r} is unknown; use {', '.join(OPENMOJI)}, tfds:NAME, or a file ending in "
            f"{', '.join(_READERS)}"
        )
    paths = [path] if path.is_file() else [Path(found) for found in sorted(glob.glob(str(path)))]
    if not paths:
        raise FileNotFoundError(f"prompts.source={source!r}: no such file")
    if path.suffix != ".txt":
        need_column(source, column)
    return (row for each in paths for row in _READERS[path.suffix](each, column))


def text_lines(path: Path) -> Rows:
    """The lines of a text file without their ends, and None for a line that is not UTF-8.

    A byte-order mark at the start, which Windows editors write, is not part of the first line.

    Raises:
      ValueError: the file is UTF-16.
      OSError: it cannot be read; names it.
    """
    for line in _lines(path):
        yield _decode(line)


def _text(path: Path, column: str) -> Rows:
    return text_lines(path)


def _lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        for number, line in enumerate(file):
            if number == 0 and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # else texts with NULs
                raise ValueError(f"{path} is UTF-16, not UTF-8; save it as UTF-8")
            yield line.rstrip(b"\r\n")


def _decode(line: bytes) -> str | None:
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None


def _jsonl(path: Path, column: str) -> Rows:
    for line in _lines(path):
        if line.strip():
            yield from texts(parse_json(line), column.split("."))


def parse_json(line: bytes | str) -> Any:
    """The line's value; None if it is not JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _parquet(path: Path, column: str) -> Rows:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise ValueError(f"reading {path} needs pyarrow, which is not installed: pip install pyarrow") from error
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is not a Parquet file ({error}); it may be incomplete: download it again") from error
    names = column.split(".")
    if names[0] not in file.schema_arrow.names:
        raise ValueError(f"{path} has no column {names[0]!r}; it has {', '.join(file.schema_arrow.names)}")
    for batch in file.iter_batches(columns=[column]):
        for value in batch.column(0).to_pylist():
            yield from texts(value, names[1:])


_READERS = {".txt": _text, ".jsonl": _jsonl, ".parquet": _parquet}


# ---------------------------------------------------------------- TFDS


def tfds_set(name: str, column: str, split: str, data_dir: str) -> Rows:
    """Reads one column of a prepared TFDS set; does not decode images beside it.

    Raises: see `records.open_prepared`.
    """
    import tensorflow_datasets as tfds

    names = column.split(".")
    rows, features = records.open_prepared(name, split=split, columns=names[:1], data_dir=data_dir)
    feature = tfds.features.FeaturesDict({names[0]: features[names[0]]})
    for record in rows:
        yield from texts(feature.deserialize_example_np(record), names)


def texts(value: Any, names: list[str]) -> Rows:
    """All texts of one row under a dotted column; one None if there is no text."""
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    if isinstance(value, list | tuple | np.ndarray):
        for item in value:
            yield from texts(item, [])
    elif isinstance(value, bytes):
        yield _decode(value)
    else:
        yield value if isinstance(value, str) else None
