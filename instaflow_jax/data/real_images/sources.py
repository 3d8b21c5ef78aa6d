"""Where real images come from: a directory with captions, or a TFDS set. Each has exactly one caption.

A directory holds its captions in `metadata.jsonl`, one object a line with `file_name` and a column of text (as Hugging
Face's imagefolder), or as NAME.txt beside each image. An image without a caption, and one that cannot be read, is an
error: what is trained on is never less than what was given.
"""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from jaxtyping import UInt8
from numpy import ndarray

from instaflow_jax.data import prompt_sources, prompts, records
from instaflow_jax.infra import images, stores

METADATA = "metadata.jsonl"
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_LONGEST = 16  # times the short side; what is cropped away of a longer image would take gigabytes


class RealImage(NamedTuple):
    """One image.

    Attributes:
      name: within its source, which may be moved.
      where: how error messages name it.
      caption: one line of text.
      size: bytes of its file or record.
      read: returns the bytes of its file.
    """

    name: str
    where: str
    caption: str
    size: int
    read: Callable[[], bytes]


def load(source: str, column: str, split: str) -> list[RealImage]:
    """All images of a source in a fixed order; does not read their pixels yet.

    Args:
      source: a directory, or "tfds:NAME" (or "tfds:DIRECTORY") for a set that TFDS has prepared as array_record.
      column: the column of the captions in metadata.jsonl or in the set; dots select nested fields
        ("captions.text"), and of several texts the first counts.
      split: TFDS split.

    Raises:
      FileNotFoundError: there is no such directory, set or image.
      ValueError: it holds no images, or one has no caption; names the first and counts the rest.
    """
    if source.startswith("tfds:"):
        return _from_tfds(source.removeprefix("tfds:"), column, split)
    return _from_directory(stores.local(source), column)


def sha256(found: Sequence[RealImage]) -> str:
    """SHA-256 of the list of images: names, sizes and captions."""
    return prompts.sha256(f"{image.name}\0{image.size}\0{image.caption}" for image in found)


def pixels(image: RealImage, height: int, width: int) -> UInt8[ndarray, "{height} {width} 3"]:
    """The image upright, on white where it is transparent, resized by Lanczos' filter to cover the size, and cropped
    to its centre.

    Raises:
      ValueError: it cannot be read as an image, or is far longer than wide; names it.
    """
    decoded = images.decode(image.read(), image.where)
    if max(decoded.size) > _LONGEST * min(decoded.size):
        raise ValueError(
            f"{image.where} has {decoded.width}×{decoded.height} pixels: one side may be at most {_LONGEST} times the "
            "other; crop it, or take it out"
        )
    return images.cover(decoded, height, width)


def problem(image: RealImage) -> str:
    """Why the image cannot be used; "" if it can."""
    try:
        pixels(image, 1, 1)
    except (ValueError, OSError) as error:
        return str(error)
    return ""


# ---------------------------------------------------------------- a directory


def _from_directory(folder: Path, column: str) -> list[RealImage]:
    if not folder.is_dir():
        raise FileNotFoundError(f"config.images.source: there is no directory {folder}")
    paths = sorted(path for path in folder.rglob("*") if _is_image(path.relative_to(folder)))
    metadata = folder / METADATA
    captions = _read_metadata(metadata, column) if metadata.is_file() else _read_texts(paths)
    paths = sorted({*paths, *captions})
    if not paths:
        raise ValueError(f"{folder} holds no images ({', '.join(SUFFIXES)})")
    place = f"a line of {metadata}" if metadata.is_file() else "the .txt file beside it"
    _check_captions([(str(path), captions.get(path)) for path in paths], place)
    absent = [path for path in paths if not path.is_file()]
    if absent:
        raise FileNotFoundError(f"{absent[0]}, which {metadata} names, is missing, as are {len(absent) - 1} more")
    names = [Path(os.path.relpath(path, folder)).as_posix() for path in paths]
    return [
        RealImage(name, str(path), captions[path], path.stat().st_size, path.read_bytes)
        for name, path in zip(names, paths, strict=True)
    ]


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not any(part.startswith(".") for part in path.parts)


def _read_texts(paths: Sequence[Path]) -> dict[Path, str]:
    """The captions of the images that have a .txt file; its lines are joined."""
    found = {}
    for path in paths:
        beside = path.with_suffix(".txt")
        if beside.is_file():
            found[path] = _caption(" ".join(_text(line, beside) for line in prompt_sources.text_lines(beside)))
    return found


def _text(line: str | None, path: Path) -> str:
    if line is None:
        raise ValueError(f"{path} is not UTF-8 (perhaps Latin-1); save it as UTF-8")
    return line


def _read_metadata(path: Path, column: str) -> dict[Path, str]:
    """The captions of the images that the file names."""
    found = {}
    for number, line in enumerate(prompt_sources.text_lines(path), 1):
        if line is not None and not line.strip():
            continue
        row = prompt_sources.parse_json(line or "")
        name = row.get("file_name") if isinstance(row, Mapping) else None
        if not isinstance(name, str) or not name:
            raise ValueError(f'{path}, line {number}, is not an object in JSON with a "file_name"')
        if column.split(".")[0] not in row:
            raise ValueError(
                f"{path}, line {number}, has no column {column!r}; it has {', '.join(row)}: use config.images.column"
            )
        found[path.parent / name] = _caption(next(prompt_sources.texts(row, column.split(".")), None))
    return found


def _caption(text: str | None) -> str:
    """The text on one line; "" if it is not a text."""
    return prompts.normalize(text) if text is not None and prompts.encodes(text) else ""


def _check_captions(captions: Sequence[tuple[str, str | None]], place: str) -> None:
    """Raises ValueError naming the first image without a caption."""
    missing = [where for where, caption in captions if not caption]
    if missing:
        raise ValueError(
            f"{missing[0]} has no caption, nor have {len(missing) - 1} more of {len(captions)} images; write it into "
            f"{place}, or take the image out"
        )


# ---------------------------------------------------------------- TFDS


def _from_tfds(name: str, column: str, split: str) -> list[RealImage]:
    import tensorflow_datasets as tfds

    first, *rest = column.split(".")
    rows, features = records.open_prepared(name, split=split, columns=(first,))
    found = [key for key, feature in features.items() if isinstance(feature, tfds.features.Image)]
    if len(found) != 1:
        raise ValueError(f"tfds:{name} needs exactly one column of images, and has {', '.join(found) or 'none'}")
    words, image = (tfds.features.FeaturesDict({key: features[key]}) for key in (first, found[0]))
    decoders = {found[0]: tfds.decode.SkipDecoding()}

    def read(row: int) -> bytes:
        return image.deserialize_example_np(rows[row], decoders=decoders)[found[0]]

    def load_row(row: int) -> RealImage:
        record = rows[row]
        text = next(prompt_sources.texts(words.deserialize_example_np(record)[first], rest), None)
        label = f"{split} {row}"
        return RealImage(label, f"tfds:{name}, {label}", _caption(text), len(record), functools.partial(read, row))

    listed = [load_row(row) for row in range(len(rows))]
    if not listed:
        raise ValueError(f"tfds:{name}, {split} holds no images")
    _check_captions([(each.where, each.caption) for each in listed], f"the column {column!r}")
    return listed
