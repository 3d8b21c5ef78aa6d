"""Where prompts come from: each source gives its rows in order, None for a row that is no text."""

import glob
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from instaflow_jax.data.openmoji.captions import draw
from instaflow_jax.data.openmoji.drawing import catalogue

Rows = Iterator[str | None]
_PLAIN = 3  # how often a pass over OpenMoji shows an emoji without a skin tone; those with one are half of all


def openmoji(count: int, seed: int) -> Rows:
    """Captions as the embedded teacher saw them: every emoji in turn, at a random level, none empty.

    The i-th depends on (seed, i) alone. Needs the names of the emoji (package `emoji`), not their pictures.

    Raises:
      ValueError: count is not positive, or the package is not installed.
    """
    if count < 1:
        raise ValueError(f"OpenMoji's captions have no end: say how many, count={count} is not positive")
    try:
        known, _ = catalogue()
    except ModuleNotFoundError as error:
        raise ValueError(
            "prompts.source='openmoji' needs the names in the package 'emoji': pip install emoji, or give "
            "a file of prompts"
        ) from error
    deck = [e for e in known for _ in range(1 if e.skin_tone else _PLAIN)]
    for start in range(0, count, len(deck)):
        order = np.random.default_rng([seed, start]).permutation(len(deck))
        for i, card in enumerate(order[: count - start], start):
            yield draw(deck[card], seed, i, empty=0.0)


def need_column(source: str, column: str) -> str:
    """The column, unless none is named. Raises ValueError."""
    if not column:
        raise ValueError(f"prompts.source={source!r} needs prompts.column, the name of the column with the text")
    return column


# ---------------------------------------------------------------- files


def files(source: str, column: str) -> Rows:
    """The rows of one file or of a glob, by the ending of its name.

    Raises:
      ValueError: an ending that is not known, a file that is not what its ending says, or no such column.
      FileNotFoundError: no such file.
    """
    path = Path(source).expanduser()
    if path.suffix not in _READERS:
        raise ValueError(
            f"prompts.source={source!r} is not known: openmoji, tfds:NAME, or a file ending in {', '.join(_READERS)}"
        )
    paths = [path] if path.is_file() else [Path(found) for found in sorted(glob.glob(str(path)))]
    if not paths:
        raise FileNotFoundError(f"prompts.source={source!r}: no such file")
    if path.suffix != ".txt":
        need_column(source, column)
    return (row for each in paths for row in _READERS[path.suffix](each, column))


def _text(path: Path, column: str) -> Rows:
    for line in _lines(path):
        yield _decoded(line)


def _lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        for line in file:
            yield line.rstrip(b"\r\n")


def _decoded(line: bytes) -> str | None:
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None


def _jsonl(path: Path, column: str) -> Rows:
    for line in _lines(path):
        if line.strip():
            yield from _texts(_parsed(line), column.split("."))


def _parsed(line: bytes) -> Any:
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
            yield from _texts(value, names[1:])


_READERS = {".txt": _text, ".jsonl": _jsonl, ".parquet": _parquet}


# ---------------------------------------------------------------- TFDS


def tfds_set(name: str, column: str, split: str, data_dir: str) -> Rows:
    """Reads one column of a prepared set; pictures beside it are not decoded.

    Raises:
      ValueError: no such split or column, several sets of that name, or one that is not stored as array_record.
      FileNotFoundError: no prepared set.
    """
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(_prepared(name, Path(data_dir or tfds.core.constants.DATA_DIR)))
    if split not in builder.info.splits:
        raise ValueError(f"tfds:{name} has no split {split!r}; it has {', '.join(builder.info.splits) or 'none'}")
    names = column.split(".")
    if names[0] not in builder.info.features:
        raise ValueError(f"tfds:{name} has no column {names[0]!r}; it has {', '.join(builder.info.features)}")
    if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        raise ValueError(
            f"tfds:{name} is stored as {builder.info.file_format}, which takes TensorFlow to read; prepare "
            "it with file_format='array_record'"
        )
    feature = tfds.features.FeaturesDict({names[0]: builder.info.features[names[0]]})
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    for record in builder.as_data_source(split, deserialize_method=raw):
        yield from _texts(feature.deserialize_example_np(record), names)


def _prepared(name: str, data_dir: Path) -> Path:
    """The one directory that holds the set. Looking it up by name in TFDS would import its code, and TensorFlow."""
    root = Path(name) if Path(name).is_dir() else data_dir.expanduser() / name
    found = sorted(path.parent for path in root.rglob("dataset_info.json"))
    if not found:
        raise FileNotFoundError(
            f"prompts.source='tfds:{name}': no prepared set in {root}; prepare it there with "
            f"tfds.builder({name!r}, file_format='array_record').download_and_prepare()"
        )
    if len(found) > 1:
        listed = ", ".join(str(path) for path in found)
        raise ValueError(f"prompts.source='tfds:{name}' is one of several sets: take tfds:DIRECTORY of {listed}")
    return found[0]


def _texts(value: Any, names: list[str]) -> Rows:
    """Every text that the dotted column leads to in one row; one None where it leads to none."""
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    if isinstance(value, list | tuple | np.ndarray):
        for item in value:
            yield from _texts(item, [])
    elif isinstance(value, bytes):
        yield _decoded(value)
    else:
        yield value if isinstance(value, str) else None
