"""COCO's photographs and their first captions, from the TFDS set `coco_captions` or from the official files.

Of an image's five captions the first counts. Photographs are resized by Lanczos, the short side to the size wanted, and
the square in the middle is cut out: the protocol of the paper's tables.
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

from instaflow_jax.infra import files

HOME = "https://cocodataset.org/#download"


@dataclasses.dataclass(frozen=True)
class Photo:
    """One image of COCO.

    Attributes:
      id: COCO's number of it.
      caption: its first.
      where: what to call it when it cannot be read.
      present: whether it is there to be read.
      read: gives the bytes of its file.
    """

    id: int
    caption: str
    where: str
    present: Callable[[], bool]
    read: Callable[[], bytes]


def load(source: str, captions: str, split: str) -> list[Photo]:
    """All photographs in the order of their ids; their pixels are not read yet.

    Args:
      source: a directory of images, or "tfds:DIRECTORY" of a prepared `coco_captions`, or "tfds:coco_captions" in the
        default directory of TFDS, stored as array_record (so that it takes no TensorFlow).
      captions: the captions' JSON file, e.g. annotations/captions_val2017.json; "" for TFDS.
      split: of TFDS, several joined by "+"; "" for a directory. `coco_captions` splits COCO 2014 as Karpathy did:
        what COCO calls val is "val+test+restval".

    Raises:
      FileNotFoundError: there is no such set or file; says where it is to be had.
      ValueError: it is not what it should be.
    """
    if source.startswith("tfds:"):
        if captions or not split:
            raise ValueError(
                f"source={source!r} has its captions in itself and needs a split: give split=... and "
                f"captions='', not captions={captions!r} and split={split!r}"
            )
        photos = _from_tfds(source.removeprefix("tfds:"), split)
    else:
        if split or not captions:
            raise ValueError(
                f"source={source!r}, a directory, needs a file of captions and has no splits: give "
                f"captions=... and split='', not captions={captions!r} and split={split!r}"
            )
        photos = _from_directory(Path(source).expanduser(), Path(captions).expanduser())
    if not photos:
        raise ValueError(f"{source} holds no photographs")
    return sorted(photos, key=operator.attrgetter("id"))


def choose(photos: Sequence[Photo], count: int) -> list[Photo]:
    """`count` of them in the order of their ids: the same ones for everybody, drawn at random where there are more.

    Raises:
      ValueError: there are fewer.
    """
    if count > len(photos):
        raise ValueError(
            f"{count} captions were asked for, but there are only {len(photos)} photographs: ask for "
            "fewer, or give the whole set"
        )
    drawn = np.random.default_rng(0).permutation(len(photos))[:count]
    return [photos[i] for i in sorted(drawn)]


def check_present(photos: Sequence[Photo]) -> None:
    """FileNotFoundError if a photograph is not there, naming the first and counting the others."""
    absent = [photo.where for photo in photos if not photo.present()]
    if absent:
        raise FileNotFoundError(
            f"{absent[0]} is missing, as are {len(absent) - 1} more of {len(photos)} photographs; "
            f"the zip files of all are at {HOME}"
        )


def pixels(photo: Photo, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """The square in the middle of a photograph, grey ones too as RGB.

    Raises:
      ValueError: the file is no image, or a damaged one.
    """
    try:
        with Image.open(io.BytesIO(photo.read())) as image:
            return square(image.convert("RGB"), size)
    except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError for a broken PNG
        raise ValueError(f"{photo.where} cannot be read as an image ({error}): download it again") from error


def square(image: Image.Image, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Short side to `size` by Lanczos, then the middle."""
    width, height = (round(size * side / min(image.size)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    image = image if image.size == (width, height) else image.resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(image.crop((left, top, left + size, top + size)))


# ---------------------------------------------------------------- the official files


def _from_directory(folder: Path, captions: Path) -> list[Photo]:
    if not folder.is_dir() or not captions.is_file():
        gone = captions if folder.is_dir() else folder
        raise FileNotFoundError(
            f"{gone} is missing: this takes COCO's images (e.g. val2017.zip) and its captions "
            f"(annotations_trainval2017.zip), which are at {HOME}"
        )
    names, first = _read_captions(captions)
    silent = [name for number, name in names.items() if number not in first]
    if silent:
        raise ValueError(
            f"{captions} has no caption of {silent[0]}, nor of {len(silent) - 1} more of {len(names)} "
            "images: is it the file of captions (captions_val2017.json), and whole?"
        )
    return [
        Photo(number, first[number], str(folder / name), (folder / name).is_file, (folder / name).read_bytes)
        for number, name in names.items()
    ]


def _read_captions(path: Path) -> tuple[dict[int, str], dict[int, str]]:
    """File name and first caption (first in the file, as everybody takes it) by the image's id."""
    content = files.read_json(path)
    try:
        names = {image["id"]: image["file_name"] for image in content["images"]}
        first = {}
        for annotation in content["annotations"]:
            first.setdefault(annotation["image_id"], annotation["caption"].strip())
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a file of COCO's captions: no {error} where it should be; take "
            "annotations/captions_val2017.json or the like"
        ) from error
    return names, first


# ---------------------------------------------------------------- TFDS


def _from_tfds(name: str, split: str) -> list[Photo]:
    import tensorflow_datasets as tfds

    folder = _prepared(name)
    builder = tfds.builder_from_directory(folder)
    absent = {"image", "image/id", "captions"} - set(builder.info.features)
    if absent:
        raise ValueError(f"{folder} has no {', '.join(sorted(absent))}; it is not prepared as coco_captions is")
    for part in split.split("+"):
        if part not in builder.info.splits:
            raise ValueError(f"{folder} has no split {part!r}; it has {', '.join(builder.info.splits) or 'none'}")
    if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        raise ValueError(
            f"{folder} is stored as {builder.info.file_format.value}, which takes TensorFlow to read; "
            "prepare it with "
            "tfds.builder('coco_captions', file_format='array_record').download_and_prepare()"
        )
    # Raw records: what TFDS decodes by itself would decode every photograph for the sake of its caption.
    records = builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
    words, image = (
        tfds.features.FeaturesDict({key: builder.info.features[key] for key in keys})
        for keys in (("image/id", "captions"), ("image",))
    )
    decoders = {"image": tfds.decode.SkipDecoding()}

    def read(row: int) -> bytes:
        return image.deserialize_example_np(records[row], decoders=decoders)["image"]

    def photo(row: int) -> Photo:
        known = words.deserialize_example_np(records[row])
        number, texts = int(known["image/id"]), known["captions"]["text"]
        if not len(texts):
            raise ValueError(f"{folder}: image {number} has no caption")
        return Photo(
            number, texts[0].decode().strip(), f"{folder}, image {number}", lambda: True, functools.partial(read, row)
        )

    return [photo(row) for row in range(len(records))]


def _prepared(name: str) -> Path:
    """The one directory that holds the set; to look it up by name in TFDS would import TensorFlow."""
    import tensorflow_datasets as tfds

    root = Path(name).expanduser()
    root = root if root.is_dir() else Path(tfds.core.constants.DATA_DIR).expanduser() / name
    found = sorted(path.parent for path in root.rglob("dataset_info.json"))
    if not found:
        raise FileNotFoundError(
            f"tfds:{name}: no prepared set in {root}; prepare it with "
            "tfds.builder('coco_captions', file_format='array_record').download_and_prepare()"
        )
    if len(found) > 1:
        raise ValueError(f"tfds:{name} is one of several sets: take tfds:DIRECTORY of {', '.join(map(str, found))}")
    return found[0]
