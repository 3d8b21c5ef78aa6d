"""Stage `evaluate_coco`: an image for each of COCO's captions, measured against COCO's photographs.

Everything is checked before the first image is made. Images are written atomically, so a killed run continues where it
stopped. Processes share the images between them, in one directory. All of them measure, so that none waits for another,
and the first one writes the results.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict
from PIL import Image

from instaflow_jax import __version__, pipeline, sampling
from instaflow_jax.arrays import Latent
from instaflow_jax.data import coco, noise
from instaflow_jax.infra import devices, images
from instaflow_jax.infra.files import read_json, sha256_of_json, sha256_of_params, write_json, write_text
from instaflow_jax.infra.progress import Progress
from instaflow_jax.infra.runner import BatchedRunner
from instaflow_jax.stages.common.loading import (
    SolveOptions,
    WeightOptions,
    check_drawn,
    latent_shape,
    load,
    name_image,
    read_solve_options,
    read_weight_options,
)
from instaflow_jax.stages.common.ranges import check_ranges
from instaflow_jax.stages.evaluate_coco import measures


@dataclasses.dataclass(frozen=True)
class Options:
    """What is drawn and how; see `configs/evaluate_coco.py`."""

    model: str
    weights: WeightOptions
    solving: SolveOptions
    size: int
    seed: int
    batch: int


@dataclasses.dataclass(frozen=True)
class Job:
    """What is fixed before the first image.

    Attributes:
      photos: those whose captions are the prompts, in order.
      solve: the ODE, see `sampling.make_solve`.
      recipe: everything that decides the images, as JSON.
      directory: where everything is written.
    """

    options: Options
    pipe: pipeline.Pipeline | None
    photos: list[coco.Photo]
    solve: sampling.Solve | None
    recipe: dict[str, Any]
    directory: Path

    def path(self, photo: coco.Photo) -> Path:
        """The file of the image for a caption."""
        return self.directory / "pictures" / f"{photo.id:012d}.png"


def run(config: ConfigDict, workdir: str) -> None:
    """Writes `workdir`/evaluate/coco: pictures/, reference.npz, results.json and results.md.

    Raises:
      ValueError, FileNotFoundError: a field of the config, or a file of a model or COCO, is wrong; nothing is written.
    """
    job, judges, photos = check(config, workdir)
    data, size = config.data, job.options.size
    real = measures.reference(judges, photos, job.directory, source=data.source, split=data.split, size=size)
    draw(job)
    devices.barrier("images of COCO's captions")
    results = measures.measure(judges, real, {job.path(photo): photo.caption for photo in job.photos}, size)
    if jax.process_index() == 0:
        report(job, results, data.source, config.to_dict())


def check(config: ConfigDict, workdir: str) -> tuple[Job, measures.Judges, list[coco.Photo]]:
    """Every check of `run`, without drawing; returns the work, the networks that measure, and all photographs.

    Raises:
      ValueError, FileNotFoundError: see `run`.
    """
    options, data = read_options(config), config.data
    photos = coco.load(data.source, data.captions, data.split)
    chosen = coco.choose(photos, data.count)
    if not config.reference:
        coco.check_present(photos)
    judges = measures.load(**{name: config[name] for name in ("inception", "clip", "reference", "batch")})
    job = prepare(options, chosen, Path(workdir) / "evaluate" / "coco")
    check_same(job)
    return job, judges, photos


def read_options(config: ConfigDict) -> Options:
    """The config as values, checked before anything is loaded. Raises ValueError."""
    check_ranges(config)
    fields = {name: config[name] for name in ("model", "size", "seed", "batch")}
    return Options(weights=read_weight_options(config), solving=read_solve_options(config), **fields)


def prepare(options: Options, photos: list[coco.Photo], directory: Path) -> Job:
    """Loads the model to measure.

    Raises:
      ValueError, FileNotFoundError: one of its files is wrong, or its images are smaller than `options.size`.
    """
    solving, pipe = options.solving, load(options.model, options.weights)
    shape = latent_shape(pipe.nets, solving.height, solving.width)
    height, width = (side * pipe.nets["vae"].config.factor for side in shape[:2])
    if min(height, width) < options.size:
        raise ValueError(
            f"config.size={options.size} exceeds the model's images of {width}×{height}, which are only ever reduced; "
            "lower it, or raise config.height and config.width"
        )
    dynamics = sampling.read_dynamics(pipe.scheduler, pipe.index, solving.dynamics)
    solve = sampling.make_solve(pipe.nets["unet"].apply, dynamics, solving.solver, solving.N, solving.alpha)
    recipe = {name: getattr(solving, name) for name in ("solver", "N", "alpha", "negative")} | {
        "kind": solving.dynamics,  # the keys and values of version 0.1, whose runs can be continued
        "dtype": options.weights.dtype,
        "seed": options.seed,
        "size": options.size,
        "model": {name: sha256_of_params(params) for name, params in pipe.params.items()}
        | {"tokenizer": sha256_of_json([pipe.tokenizer.vocab, pipe.tokenizer.merges, pipe.tokenizer.config])},
        "dynamics": f"Flow(factor={dynamics.factor}, steps={dynamics.num_timesteps})"
        if isinstance(dynamics, sampling.Flow)
        else pipe.scheduler,
        "latent_shape": list(shape),
        "noise": noise.NAME,
        "count": len(photos),
        "captions_sha256": sha256_of_json([[photo.id, photo.caption] for photo in photos]),
    }
    return Job(options, pipe, photos, solve, json.loads(json.dumps(recipe)), directory)


def check_same(job: Job) -> None:
    """Raises ValueError, naming the fields that differ, if the directory holds images of another recipe."""
    path = job.directory / "recipe.json"
    if not path.is_file():
        return
    there = read_json(path)
    differ = [name for name in sorted({*there, *job.recipe}) if there.get(name) != job.recipe.get(name)]
    if differ:
        raise ValueError(
            f"{job.directory} holds images of another recipe ({', '.join(differ)} "
            f"{'differs' if len(differ) == 1 else 'differ'}); use another --workdir, or delete it"
        )


def draw(job: Job) -> None:
    """Writes the recipe, then makes the missing images.

    A call always holds the same captions, no matter how often the run was killed.
    """
    if jax.process_index() == 0:
        job.directory.mkdir(parents=True, exist_ok=True)
        write_json(job.directory / "recipe.json", job.recipe)
    runner = BatchedRunner(sampling.make_generate_rows(job.pipe.nets, job.solve), job.options.batch)
    calls = [job.photos[rows] for rows in runner.batches(len(job.photos))]
    calls = calls[jax.process_index() :: jax.process_count()]
    left = [call for call in calls if not all(job.path(photo).is_file() for photo in call)]
    done = len(calls) - len(left)
    print(f"{job.path(job.photos[0]).parent}: {done} of {len(calls)} batches of {runner.rows} images exist", flush=True)
    if not left:
        return
    weights = pipeline.inference_params(job.pipe.nets, job.pipe.params)
    fixed = runner.place((weights, job.pipe.tokenizer([job.options.solving.negative])))
    progress = Progress(len(calls), "batches", title="drawing", done=done)
    for call in left:
        ids = measures.token_ids(job.pipe.tokenizer, [photo.caption for photo in call])
        drawn, finite = runner(fixed, ids, draw_noise(job, call))
        check_drawn(finite, [name_image(photo.caption, f"{job.options.seed}, image {photo.id}") for photo in call])
        write(job, call, drawn)
        progress.advance()
    progress.close()


def draw_noise(job: Job, photos: Sequence[coco.Photo]) -> Latent:
    """X0 of each photo's image, float32 [B, h, w, c], from the seed and the photo's id alone."""
    shape = job.recipe["latent_shape"]
    return np.stack([noise.noise(job.options.seed, photo.id, shape) for photo in photos]).astype(np.float32)


def write(job: Job, photos: Sequence[coco.Photo], drawn: UInt8[np.ndarray, "B H W 3"]) -> None:
    """Reduces images to the measured size, like the photographs, and writes those that do not exist."""
    options = job.options
    for photo, image in zip(photos, drawn, strict=True):
        if not job.path(photo).is_file():
            text = {"prompt": photo.caption, "seed": f"{options.seed}, image {photo.id}", "model": options.model}
            images.save_png(job.path(photo), coco.square(Image.fromarray(image), options.size), text)


def report(job: Job, results: dict[str, Any], source: str, config: dict[str, Any]) -> None:
    """Writes results.json and results.md, and prints the latter."""
    options = job.options
    about = {
        "model": options.model,
        "code": f"instaflow_jax {__version__}",
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "config": config,
    }
    write_json(job.directory / "results.json", {"results": results, "recipe": job.recipe, "about": about})
    model = {"model": options.model, "N": options.solving.N, "α": f"{options.solving.alpha:g}"}
    text = measures.table(f"COCO, {source}, {options.size}×{options.size} pixels", model, results)
    write_text(job.directory / "results.md", text)
    print(f"{text}\nwrote {job.directory / 'results.json'}", flush=True)
