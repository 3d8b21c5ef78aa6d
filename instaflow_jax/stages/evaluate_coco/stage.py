"""Stage `evaluate_coco`: a picture for each of COCO's captions, measured against COCO's photographs.

Everything is checked before the first picture is made. Pictures are PNGs that appear whole, so a run that was killed
goes on where it stopped. Processes share the pictures between them, over one directory; all of them measure, so that
none waits for another, and the first one writes.
"""

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int, UInt8
from ml_collections import ConfigDict
from PIL import Image

from instaflow_jax import __version__, pipeline, sampling
from instaflow_jax.data import coco, noise
from instaflow_jax.evals.features import Spread
from instaflow_jax.infra import devices, files, images
from instaflow_jax.infra.files import read_json, sha256_of_json, sha256_of_params, write_json
from instaflow_jax.infra.progress import clock_time
from instaflow_jax.stages.common.loading import latent_shape, load, read_solve_options, read_weight_options
from instaflow_jax.stages.evaluate_coco import measures as measure

_LEAST = 4  # pictures; with fewer there are no third neighbours
_TELL_EVERY = 30  # seconds


@dataclasses.dataclass(frozen=True)
class Job:
    """What is fixed before the first picture.

    Attributes:
      photos: those whose captions are asked for, in order.
      solve: the ODE, see `sampling.make_solve`.
      recipe: all that decides the pictures; JSON.
      directory: where everything is written.
    """

    config: ConfigDict
    pipe: pipeline.Pipeline
    photos: list[coco.Photo]
    solve: sampling.Solve
    recipe: dict[str, Any]
    directory: Path

    def path(self, photo: coco.Photo) -> Path:
        """Of the picture for a caption."""
        return self.directory / "pictures" / f"{photo.id:012d}.png"


def run(config: ConfigDict, workdir: str) -> None:
    """Writes `workdir`/evaluate/coco: pictures/, reference.npz, results.json and results.md.

    Raises:
      ValueError, FileNotFoundError: a field of the config, a file of a model or of COCO is wrong; nothing is written.
    """
    check(config)
    photos = coco.load(**{name: config.data[name] for name in ("source", "captions", "split")})
    chosen = coco.choose(photos, config.data.count)
    if not config.reference:
        coco.check_present(photos)
    judges = measure.load(config)
    job = prepare(config, chosen, Path(workdir) / "evaluate" / "coco")
    check_same(job)
    real = measure.reference(config, judges, photos, job.directory)
    begin(job)
    draw(job)
    devices.barrier("pictures of COCO's captions")
    results = measure.run(config, judges, real, {job.path(photo): photo.caption for photo in chosen})
    if jax.process_index() == 0:
        report(job, results)


def check(config: ConfigDict) -> None:
    """Cross-field checks, before anything is loaded. Raises ValueError."""
    read_weight_options(config)
    read_solve_options(config)
    for field, value, least in (
        ("batch", config.batch, 1),
        ("size", config.size, 1),
        ("N", config.N, 1),
        ("seed", config.seed, 0),
        ("data.count", config.data.count, _LEAST),
    ):
        if value < least:
            raise ValueError(f"config.{field}={value} must be at least {least}")


def prepare(config: ConfigDict, photos: list[coco.Photo], directory: Path) -> Job:
    """Reads the model that is to be measured.

    Raises:
      ValueError, FileNotFoundError: a file of it is wrong, or its pictures are smaller than `config.size`.
    """
    pipe = load(config.model, read_weight_options(config))
    shape = latent_shape(pipe, config.height, config.width)
    height, width = (side * pipe.nets["vae"].config.factor for side in shape[:2])
    if min(height, width) < config.size:
        raise ValueError(
            f"config.size={config.size} exceeds the model's pictures of {width}×{height}, which are "
            "reduced to it and never enlarged: lower it, or raise config.height and config.width"
        )
    dynamics = sampling.read_dynamics(pipe.scheduler, pipe.index, config.dynamics)
    solve = sampling.make_solve(pipe.nets["unet"].apply, dynamics, config.solver, config.N, config.alpha)
    settings = ("kind", "solver", "N", "alpha", "negative", "dtype", "seed", "size")
    recipe = {name: config[name] for name in settings} | {
        "model": {name: sha256_of_params(params) for name, params in pipe.params.items()}
        | {"tokenizer": sha256_of_json([pipe.tokenizer.vocab, pipe.tokenizer.merges, pipe.tokenizer.config])},
        "dynamics": repr(dynamics) if isinstance(dynamics, sampling.Flow) else pipe.scheduler,
        "latent_shape": list(shape),
        "noise": noise.NAME,
        "count": len(photos),
        "captions_sha256": sha256_of_json([[photo.id, photo.caption] for photo in photos]),
    }
    return Job(config, pipe, photos, solve, json.loads(json.dumps(recipe)), directory)


def check_same(job: Job) -> None:
    """Makes sure that pictures which are there were made by the same recipe.

    Raises:
      ValueError: they were not; names the fields that differ.
    """
    path = job.directory / "recipe.json"
    if not path.is_file():
        return
    there = read_json(path)
    differ = [name for name in sorted({*there, *job.recipe}) if there.get(name) != job.recipe.get(name)]
    if differ:
        raise ValueError(
            f"{job.directory} holds pictures of another recipe ({', '.join(differ)} "
            f"{'differs' if len(differ) == 1 else 'differ'}): take another --workdir, or delete it"
        )


def begin(job: Job) -> None:
    """Notes the recipe before the first picture."""
    if jax.process_index() == 0:
        job.directory.mkdir(parents=True, exist_ok=True)
        write_json(job.directory / "recipe.json", job.recipe)


def draw(job: Job) -> None:
    """Makes the pictures that are not there. Calls always hold the same captions, however often the run was killed."""
    rows = job.config.batch * len(jax.local_devices())
    starts = range(rows * jax.process_index(), len(job.photos), rows * jax.process_count())
    calls = [job.photos[start : start + rows] for start in starts]
    left = [call for call in calls if not all(job.path(photo).is_file() for photo in call)]
    print(
        f"{job.directory / 'pictures'}: {len(calls) - len(left)} of {len(calls)} batches of {rows} pictures are there",
        flush=True,
    )
    if not left:
        return
    generate = sampling.make_generate(job.pipe.nets, job.solve)
    fixed = job.pipe.params, job.pipe.tokenizer([job.config.negative])
    spread = Spread(lambda fixed, ids, X0: generate(fixed[0], ids, fixed[1], X0), fixed, job.config.batch)

    def ids(call: Sequence[coco.Photo]) -> Int[np.ndarray, "B L"]:
        return measure.tokens(job.pipe.tokenizer, [photo.caption for photo in call])

    began = told = time.monotonic()
    for done, call in enumerate(left, 1):
        write(job, call, spread(ids(call), draw_noise(job, call)))
        now = time.monotonic()
        if now - told > _TELL_EVERY or done == len(left):
            told = now
            print(
                f"{done}/{len(left)} batches · {clock_time(now - began)} gone, "
                f"{clock_time((now - began) / done * (len(left) - done))} left",
                flush=True,
            )


def draw_noise(job: Job, photos: Sequence[coco.Photo]) -> np.ndarray:
    """X0 of each, from the seed and the image's id alone. Float32 [B, h, w, c]."""
    shape = job.recipe["latent_shape"]
    return np.stack([noise.noise(job.config.seed, photo.id, shape) for photo in photos]).astype(np.float32)


def write(job: Job, photos: Sequence[coco.Photo], pictures: UInt8[np.ndarray, "B H W 3"]) -> None:
    """Reduces pictures to the size measured at, as the photographs are, and writes those that are not there."""
    for photo, picture in zip(photos, pictures, strict=True):
        if not job.path(photo).is_file():
            text = {"prompt": photo.caption, "seed": f"{job.config.seed}, image {photo.id}", "model": job.config.model}
            images.save_png(job.path(photo), coco.square(Image.fromarray(picture), job.config.size), text)


def report(job: Job, results: Mapping[str, Any]) -> None:
    """Writes results.json and results.md, and prints the latter."""
    about = {
        "model": job.config.model,
        "code": f"instaflow_jax {__version__}",
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "config": job.config.to_dict(),
    }
    write_json(job.directory / "results.json", {"results": results, "recipe": job.recipe, "about": about})
    size = job.config.size
    text = measure.table(f"COCO, {job.config.data.source}, {size}×{size} pixels", results, job.config)
    with files.atomic_write(job.directory / "results.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"{text}\nwrote {job.directory / 'results.json'}", flush=True)
