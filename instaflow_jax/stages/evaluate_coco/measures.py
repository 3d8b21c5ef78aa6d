"""What `evaluate_coco` measures: FID, KID, precision and recall against COCO's photographs, and CLIP score.

Inception's features are pytorch-fid's: `python -m pytorch_fid DIR/pictures DIR/reference.npz` gives the same FID.
"""

import dataclasses
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, PyTree, UInt8

from instaflow_jax.arrays import Params
from instaflow_jax.data import coco
from instaflow_jax.evals import clip_score, features, frechet
from instaflow_jax.evals.error_bar import mean_and_error
from instaflow_jax.evals.kid import kid
from instaflow_jax.evals.precision_recall import precision_recall
from instaflow_jax.infra import files, images
from instaflow_jax.infra.files import read_json, sha256_of_json, sha256_of_params, write_json
from instaflow_jax.infra.progress import Progress
from instaflow_jax.infra.runner import BatchedRunner
from instaflow_jax.models.clip import CLIPModel
from instaflow_jax.stages.common.loading import check_finite, tokenize_quietly
from instaflow_jax.weights.tokenizer import Tokenizer

Read = Callable[[Any], UInt8[np.ndarray, "H W 3"]]
Reference = tuple[frechet.Moments, Float[np.ndarray, "N D"] | None]  # the photographs' statistics, and their features


@dataclasses.dataclass(frozen=True)
class Judges:
    """The networks that judge images, and the photographs' statistics if a file of them was given.

    Attributes:
      inception: images in bytes → features.
      clip: CLIP's pixels and token ids → cosine.
      given: the statistics of `config.reference`.
    """

    inception: BatchedRunner
    inception_params: PyTree
    inception_sha256: str
    clip: BatchedRunner
    clip_params: Params
    preprocessor: clip_score.Preprocessor
    tokenizer: Tokenizer
    given: frechet.Moments | None


def load(*, inception: str, clip: str, reference: str, batch: int) -> Judges:
    """Loads the networks, and the statistics in the file `reference` unless it is "".

    Raises:
      FileNotFoundError, ValueError: naming the file, and where to download it.
    """
    given = frechet.Moments.load(reference) if reference else None
    function, params = features.load_inception(inception)
    width = jax.eval_shape(function, params, np.zeros((1, 8, 8, 3), np.uint8)).shape[1]
    if given is not None and len(given.mean) != width:
        raise ValueError(
            f"config.reference={reference!r} is of features of {len(given.mean)} numbers, but {inception} gives "
            f"{width}; use statistics of the same network"
        )
    check_finite(inception, {"Inception": params})
    tokenizer = Tokenizer.from_pretrained(clip, "")
    net, clip_params = CLIPModel.from_pretrained(clip)
    check_finite(clip, clip_params)
    preprocessor = clip_score.read_preprocessor(clip, "", net)
    runners = BatchedRunner(function, batch), BatchedRunner(clip_score.make_clip_score(net), batch)
    digest = sha256_of_params(params)
    return Judges(runners[0], params, digest, runners[1], clip_params, preprocessor, tokenizer, given)


def reference(
    judges: Judges, photos: Sequence[coco.Photo], directory: Path, *, source: str, split: str, size: int
) -> Reference:
    """The photographs' statistics, and their features unless the statistics were given.

    Computed once and kept in `directory`. A JSON file that states their origin is written last, so it shows that the
    other files are complete.

    Raises:
      ValueError: a photograph is damaged.
    """
    if judges.given is not None:
        return judges.given, None
    origin_file, statistics, rows = (directory / f"reference{ending}" for ending in (".json", ".npz", "_features.npy"))
    origin = {
        "source": source,
        "split": split,
        "size": size,
        "captions_sha256": sha256_of_json([[photo.id, photo.caption] for photo in photos]),
        "network_sha256": judges.inception_sha256,
    }
    if origin_file.is_file() and read_json(origin_file) == origin:
        return frechet.Moments.load(statistics), np.load(rows)
    found = all_features(judges, lambda photo: coco.pixels(photo, size), photos, "Inception, photographs")
    moments = frechet.Moments.empty(found.shape[1]).add(found)
    if jax.process_index() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        origin_file.unlink(missing_ok=True)
        moments.save(statistics)
        content = io.BytesIO()
        np.save(content, found)
        files.write_bytes(rows, content.getbuffer())
        write_json(origin_file, origin)
    return moments, found


def measure(judges: Judges, real: Reference, captions: Mapping[Path, str], size: int) -> dict[str, Any]:
    """The numbers of an evaluation; None for those that need the photographs' features where there are none.

    Args:
      real: from `reference`.
      captions: the caption of each image file.
      size: height and width of the images.

    Raises:
      ValueError: an image is damaged or has another size.
    """
    moments, rows = real
    made = all_features(judges, lambda path: read_image(path, size), list(captions), "Inception, images")
    score, score_error = mean_and_error(clip_scores(judges, captions, size))
    results = {
        "real": moments.count,
        "made": len(made),
        "fid": frechet.distance(moments, frechet.Moments.empty(made.shape[1]).add(made)),
        "clip_score": score,
        "clip_score_error": score_error,
        **dict.fromkeys(("kid", "kid_deviation", "precision", "recall")),
    }
    if rows is not None:
        results["kid"], results["kid_deviation"] = kid(rows, made)
        results["precision"], results["recall"] = precision_recall(rows, made)
    return results


def all_features(judges: Judges, read: Read, items: Sequence[Any], title: str) -> Float[np.ndarray, "N D"]:
    """Inception's features, float32, of the images that `read` gives for `items`."""
    params = judges.inception.place(judges.inception_params)
    parts = [judges.inception(params, pixels) for _, pixels in batches(read, items, judges.inception, title)]
    return np.concatenate(parts)


def clip_scores(judges: Judges, captions: Mapping[Path, str], size: int) -> Float[np.ndarray, " N"]:
    """The cosine of each image and its caption."""
    params, ids = judges.clip.place(judges.clip_params), tokenize_quietly(judges.tokenizer, list(captions.values()))
    parts = [
        judges.clip(params, clip_score.preprocess(pixels, judges.preprocessor), ids[rows])
        for rows, pixels in batches(lambda path: read_image(path, size), list(captions), judges.clip, "CLIP, images")
    ]
    return np.concatenate(parts)


def batches(
    read: Read, items: Sequence[Any], runner: BatchedRunner, title: str
) -> Iterator[tuple[slice, UInt8[np.ndarray, "B H W 3"]]]:
    """The rows of each call of `runner`, and what `read` gives for those items; threads decode, since it takes long."""
    progress = Progress(len(items), "images", title=title)
    with ThreadPoolExecutor() as pool:
        for rows in runner.batches(len(items)):
            yield rows, np.stack(list(pool.map(read, items[rows])))
            progress.advance(rows.stop - rows.start)
    progress.close()


def read_image(path: Path, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """A PNG that `evaluate_coco` wrote. Raises ValueError if it is damaged or has another size."""
    remedy = "delete it and run again: only this image is made again"
    try:
        image, _ = images.load_png(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{error}; {remedy}") from error
    if image.shape[:2] != (size, size):
        raise ValueError(f"{path} has {image.shape[1]}×{image.shape[0]} pixels, not {size}×{size}; {remedy}")
    return image
