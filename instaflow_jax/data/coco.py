"""COCO's photographs and their first captions, from the TFDS set `coco_captions` or from the official files.

Each image has five captions; we use the first. Photographs are resized with Lanczos so that the short side has the
requested size, then center-cropped to a square: the protocol of the paper's tables.
"""

import dataclasses
import functools
import io
import operator
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from instaflow_jax.data import records
from instaflow_jax.infra import files, images, stores

HOME = "https://cocodataset.org/#download"


@dataclasses.dataclass(frozen=True)
class Photo:
    """One image of COCO.

    Attributes:
      id: COCO's image id.
      caption: its first caption.
      where: how error messages name it.
      present: whether its file exists.
      read: returns the bytes of its file.
    """

    id: int
    caption: str
    where: str
    present: Callable[[], bool]
    read: Callable[[], bytes]


def load(source: str, captions: str, split: str) -> list[Photo]:
    """All photographs in the order of their ids; does not read their pixels yet.

    Args:
      source: a directory of images, or "tfds:DIRECTORY" with a prepared `coco_captions`, or "tfds:coco_captions" for
        the default directory of TFDS. TFDS sets must be stored as array_record, which needs no TensorFlow.
      captions: the captions' JSON file, e.g. annotations/captions_val2017.json; "" for TFDS.
      split: TFDS splits joined by "+"; "" for a directory. `coco_captions` uses Karpathy's splits of COCO 2014:
        what COCO calls val is "val+test+restval".

    Raises:
      FileNotFoundError: a set or file is missing; names it and where to get it.
      ValueError: the arguments do not fit together, or a file has the wrong content.
    """
    if source.startswith("tfds:"):
        if captions or not split:
            raise ValueError(
                f"source={source!r} has its captions in itself and needs a split; use split=... and "
                f"captions='', not captions={captions!r} and split={split!r}"
            )
        photos = _from_tfds(source.removeprefix("tfds:"), split)
    else:
        if split or not captions:
            raise ValueError(
                f"source={source!r}, a directory, needs a file of captions and has no splits; use "
                f"captions=... and split='', not captions={captions!r} and split={split!r}"
            )
        photos = _from_directory(stores.local(source), stores.local(captions))
    if not photos:
        raise ValueError(f"{source} holds no photographs")
    return sorted(photos, key=operator.attrgetter("id"))


def choose(photos: Sequence[Photo], count: int) -> list[Photo]:
    """`count` photographs in the order of their ids: a fixed random choice, the same in every run.

    Raises:
      ValueError: there are fewer.
    """
    if count > len(photos):
        raise ValueError(
            f"{count} captions were asked for, but there are only {len(photos)} photographs; "
            "use a smaller count or the full set"
        )
    drawn = np.random.default_rng(0).permutation(len(photos))[:count]
    return [photos[i] for i in sorted(drawn)]


def check_present(photos: Sequence[Photo]) -> None:
    """Raises FileNotFoundError if photographs are missing; names the first and counts the rest."""
    absent = [photo.where for photo in photos if not photo.present()]
    if absent:
        raise FileNotFoundError(
            f"{absent[0]} is missing, as are {len(absent) - 1} more of {len(photos)} photographs; "
            f"download the zip files from {HOME}"
        )


def pixels(photo: Photo, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """The photograph resized and center-cropped to size × size; gray images become RGB.

    Raises:
      ValueError: the file is not an image, or is damaged.
    """
    try:
        with Image.open(io.BytesIO(photo.read())) as image:
            return images.cover(image.convert("RGB"), size, size)
    except images.PILLOW_ERRORS as error:
        raise ValueError(f"{photo.where} cannot be read as an image ({error}): download it again") from error


# ---------------------------------------------------------------- the official files


def _from_directory(folder: Path, captions: Path) -> list[Photo]:
    if not folder.is_dir() or not captions.is_file():
        absent = captions if folder.is_dir() else folder
        raise FileNotFoundError(
            f"{absent} is missing: COCO's images (e.g. val2017.zip) and captions (annotations_trainval2017.zip) "
            f"are needed; download them from {HOME}"
        )
    names, first = _read_captions(captions)
    missing = [name for number, name in names.items() if number not in first]
    if missing:
        raise ValueError(
            f"{captions} has no caption of {missing[0]}, nor of {len(missing) - 1} more of {len(names)} "
            "images; check that it is a captions file (captions_val2017.json) and complete"
        )
    return [
        Photo(number, first[number], str(folder / name), (folder / name).is_file, (folder / name).read_bytes)
        for number, name in names.items()
    ]


def _read_captions(path: Path) -> tuple[dict[int, str], dict[int, str]]:
    """File names and captions by image id; of several captions, the first in the file, as is common practice."""
    content = files.read_json(path)
    try:
        names = {image["id"]: image["file_name"] for image in content["images"]}
        first = {}
        for annotation in content["annotations"]:
            first.setdefault(annotation["image_id"], annotation["caption"].strip())
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a file of COCO's captions: no {error} where it should be; use "
            "annotations/captions_val2017.json or the like"
        ) from error
    return names, first


# ---------------------------------------------------------------- TFDS


def _from_tfds(name: str, split: str) -> list[Photo]:
    import tensorflow_datasets as tfds

    rows, features = records.open_prepared(name, split=split, columns=("image", "image/id", "captions"))
    words, image = (
        tfds.features.FeaturesDict({key: features[key] for key in keys})
        for keys in (("image/id", "captions"), ("image",))
    )
    decoders = {"image": tfds.decode.SkipDecoding()}

    def read(row: int) -> bytes:
        return image.deserialize_example_np(rows[row], decoders=decoders)["image"]

    def photo(row: int) -> Photo:
        found = words.deserialize_example_np(rows[row])
        number, texts = int(found["image/id"]), found["captions"]["text"]
        if not len(texts):
            raise ValueError(f"tfds:{name}: image {number} has no caption")
        where = f"tfds:{name}, image {number}"
        return Photo(number, texts[0].decode().strip(), where, lambda: True, functools.partial(read, row))

    return [photo(row) for row in range(len(rows))]
