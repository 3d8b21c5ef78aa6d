"""What `evaluate_coco` says of pictures: FID, KID, precision and recall against COCO's photographs, and CLIP score.

Inception's features are those of pytorch-fid: `python -m pytorch_fid DIR/pictures DIR/reference.npz` gives the same
FID.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int, UInt8
from ml_collections import ConfigDict

from instaflow_jax.arrays import Params
from instaflow_jax.data import coco
from instaflow_jax.evals import clip_score, features, frechet
from instaflow_jax.evals import kid as kernel
from instaflow_jax.evals import precision_recall as neighbours
from instaflow_jax.infra import files, images
from instaflow_jax.infra.files import read_json, sha256_of_json, sha256_of_params, write_json
from instaflow_jax.models.clip import CLIPModel
from instaflow_jax.models.net import Net
from instaflow_jax.weights.tokenizer import Tokenizer

Read = Callable[[Any], UInt8[np.ndarray, "H W 3"]]
Reference = tuple[frechet.Moments, Float[np.ndarray, "N D"] | None]  # of photographs: statistics, features where had


@dataclasses.dataclass(frozen=True)
class Judges:
    """The networks that look at pictures, and the statistics of photographs where a file of them was given.

    Attributes:
      look: Inception on every device of this process, pictures in bytes → features.
      look_sha256: of its weights.
      given: the statistics of `config.reference`.
    """

    look: features.Spread
    look_sha256: str
    clip: tuple[Net, Params]
    preprocessor: clip_score.Preprocessor
    tokenizer: Tokenizer
    given: frechet.Moments | None


def load(config: ConfigDict) -> Judges:
    """Reads them.

    Raises:
      FileNotFoundError, ValueError: naming the file, and where it is to be had.
    """
    given = frechet.Moments.load(config.reference) if config.reference else None
    function, params = features.load_inception(config.inception)
    width = jax.eval_shape(function, params, np.zeros((1, 8, 8, 3), np.uint8)).shape[1]
    if given is not None and len(given.mean) != width:
        raise ValueError(
            f"config.reference={config.reference!r} is of features of {len(given.mean)} numbers, but "
            f"{config.inception} gives {width}: it is of another network"
        )
    tokenizer = Tokenizer.from_pretrained(config.clip, "")
    clip = CLIPModel.from_pretrained(config.clip)
    return Judges(
        features.Spread(function, params, config.batch),
        sha256_of_params(params),
        clip,
        clip_score.read_preprocessor(config.clip, "", clip[0]),
        tokenizer,
        given,
    )


def reference(config: ConfigDict, judges: Judges, photos: Sequence[coco.Photo], directory: Path) -> Reference:
    """Statistics of the photographs, and their features unless the statistics were given.

    Computed once and kept in `directory`: a note of what they were computed from is written last, and stands for whole
    files.

    Raises:
      ValueError: a photograph is damaged.
    """
    if judges.given is not None:
        return judges.given, None
    note, statistics, rows = (directory / f"reference{ending}" for ending in (".json", ".npz", "_features.npy"))
    made_from = {
        "source": config.data.source,
        "split": config.data.split,
        "size": config.size,
        "captions_sha256": sha256_of_json([[photo.id, photo.caption] for photo in photos]),
        "network_sha256": judges.look_sha256,
    }
    if note.is_file() and read_json(note) == made_from:
        return frechet.Moments.load(statistics), np.load(rows)
    found = all_features(judges.look, lambda photo: coco.pixels(photo, config.size), photos, "photographs")
    moments = frechet.Moments.empty(found.shape[1]).add(found)
    if jax.process_index() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        note.unlink(missing_ok=True)
        moments.save(statistics)
        with files.atomic_write(rows) as temporary, temporary.open("wb") as file:
            np.save(file, found)
        write_json(note, made_from)
    return moments, found


def run(config: ConfigDict, judges: Judges, real: Reference, pictures: Mapping[Path, str]) -> dict[str, Any]:
    """The numbers of an evaluation.

    Args:
      real: from `reference`.
      pictures: file → the caption it was made for.

    Raises:
      ValueError: a picture is damaged, or of another size than `config.size`.
    """
    moments, rows = real
    made = all_features(judges.look, lambda path: read_picture(path, config.size), list(pictures), "pictures")
    scores = clip_scores(config, judges, pictures)
    results = {
        "real": moments.count,
        "made": len(made),
        "fid": frechet.distance(moments, frechet.Moments.empty(made.shape[1]).add(made)),
        "clip_score": float(scores.mean()),
        "clip_score_error": float(scores.std(ddof=1) / math.sqrt(len(scores))),
        "kid": None,
        "kid_deviation": None,
        "precision": None,
        "recall": None,
    }
    if rows is not None:
        results["kid"], results["kid_deviation"] = kernel.kid(rows, made)
        results["precision"], results["recall"] = neighbours.precision_recall(rows, made)
    return results


def all_features(look: features.Spread, read: Read, items: Sequence[Any], what: str) -> Float[np.ndarray, "N D"]:
    """Inception's features of everything that `read` gives for `items`, float32."""
    parts = []
    for start, pixels in batches(read, items, look.rows):
        parts.append(look(pixels))
        tell(start + len(pixels), len(items), look.rows, f"Inception: {what}")
    return np.concatenate(parts)


def clip_scores(config: ConfigDict, judges: Judges, pictures: Mapping[Path, str]) -> Float[np.ndarray, " N"]:
    """The cosine of each picture and its caption."""
    net, params = judges.clip
    score = clip_score.make_clip_score(net)
    spread = features.Spread(lambda params, pixels, ids: score(params, pixels, ids), params, config.batch)
    paths, parts = list(pictures), []
    ids = tokens(judges.tokenizer, list(pictures.values()))
    for start, pixels in batches(lambda path: read_picture(path, config.size), paths, spread.rows):
        parts.append(spread(clip_score.preprocess(pixels, judges.preprocessor), ids[start : start + len(pixels)]))
        tell(start + len(pixels), len(paths), spread.rows, "CLIP: pictures")
    return np.concatenate(parts).astype(np.float64)


def tokens(tokenizer: Tokenizer, captions: list[str]) -> Int[np.ndarray, "N L"]:
    """Of captions; some are longer than a text encoder takes, and thousands of warnings would help nobody."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the prompt", category=UserWarning)
        return tokenizer(captions)


def batches(read: Read, items: Sequence[Any], rows: int) -> Iterator[tuple[int, UInt8[np.ndarray, "B H W 3"]]]:
    """`read` of `rows` items at a time, with the number of the first; by threads, since decoding takes long."""
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(items), rows):
            yield start, np.stack(list(pool.map(read, items[start : start + rows])))


def read_picture(path: Path, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """A PNG that `evaluate_coco` wrote. Raises ValueError if it is damaged or of another size."""
    again = "delete it and start again: it alone is made anew"
    try:
        picture, _ = images.load_png(path)
    except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError for a broken PNG
        raise ValueError(f"{path} cannot be read ({error}); {again}") from error
    if picture.shape[:2] != (size, size):
        raise ValueError(f"{path} has {picture.shape[1]}×{picture.shape[0]} pixels, not {size}×{size}; {again}")
    return picture


def tell(done: int, count: int, rows: int, what: str) -> None:
    """A line now and then: some twenty in all."""
    if done == count or done // rows % max(count // rows // 20, 1) == 0:
        print(f"{what} {done}/{count}", flush=True)


def table(title: str, results: Mapping[str, Any], config: ConfigDict) -> str:
    """The results as a Markdown table of one row, so that rows of several runs go under one head."""

    def shown(name: str, form: str, factor: float = 1.0) -> str:
        return "–" if results[name] is None else format(factor * results[name], form)

    kid = shown("kid", ".2f", 1e3)
    kid = kid if results["kid"] is None else f"{kid} ± {shown('kid_deviation', '.2f', 1e3)}"
    cells = {
        "model": config.model,
        "N": config.N,
        "α": f"{config.alpha:g}",
        "FID": shown("fid", ".2f"),
        "CLIP score": f"{shown('clip_score', '.4f')} ± {shown('clip_score_error', '.4f')}",
        "KID × 10³": kid,
        "precision": shown("precision", ".3f"),
        "recall": shown("recall", ".3f"),
        "pictures": results["made"],
        "photographs": shown("real", "d", 1),
    }
    rows = (cells, ["---"] * len(cells), cells.values())
    return f"{title}\n\n" + "".join("| " + " | ".join(map(str, row)) + " |\n" for row in rows)
