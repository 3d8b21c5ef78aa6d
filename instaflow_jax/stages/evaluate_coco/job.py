"""The work of one row: its model, the recipe of its images, and the images."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from instaflow_jax import pipeline, sampling
from instaflow_jax.arrays import Latent, TokenIds
from instaflow_jax.data import coco, noise
from instaflow_jax.evals.error_bar import mean_and_error
from instaflow_jax.infra import images
from instaflow_jax.infra.files import read_json, sha256_of_json, sha256_of_params, write_json
from instaflow_jax.infra.progress import Progress
from instaflow_jax.infra.runner import BatchedRunner
from instaflow_jax.stages.common.loading import check_drawn, latent_shape, load, name_image, tokenize_quietly
from instaflow_jax.stages.common.model_measures import make_straightness, median_seconds
from instaflow_jax.stages.evaluate_coco.rows import Options


@dataclasses.dataclass(frozen=True)
class Job:
    """What is fixed before the first image of a row.

    Attributes:
      pipe: None for a row that waits, so that one model at a time is in memory.
      photos: those whose captions are the prompts, in order.
      dynamics: the model as a flow or a teacher.
      solve: the ODE, see `sampling.make_solve`.
      recipe: everything that decides the images, as JSON.
      directory: where the row is written.
    """

    options: Options
    pipe: pipeline.Pipeline | None
    photos: list[coco.Photo]
    dynamics: sampling.Dynamics | None
    solve: sampling.Solve | None
    recipe: dict[str, Any]
    directory: Path

    def path(self, photo: coco.Photo) -> Path:
        """The file of the image for a caption."""
        return self.directory / "pictures" / f"{photo.id:012d}.png"

    def ids(self, photos: Sequence[coco.Photo]) -> TokenIds:
        """Token ids of the photographs' captions."""
        return tokenize_quietly(self.pipe.tokenizer, [photo.caption for photo in photos])

    def noise(self, photos: Sequence[coco.Photo]) -> Latent:
        """X0 of each photograph's image, float32 [B, h, w, c], from the seed and the photograph's id alone."""
        seed, shape = self.options.seed, self.recipe["latent_shape"]
        return np.stack([noise.noise(seed, photo.id, shape) for photo in photos]).astype(np.float32)

    def weights(self) -> tuple[dict[str, dict[str, Any]], TokenIds]:
        """What every call of the programs reads: the networks' weights, and the negative prompt's ids [1, L]."""
        weights = pipeline.inference_params(self.pipe.nets, self.pipe.params)
        return weights, self.pipe.tokenizer([self.options.solving.negative])


# ---------------------------------------------------------------- before the first image


def prepare(options: Options, photos: list[coco.Photo], directory: Path) -> Job:
    """Loads the model to measure.

    Raises:
      ValueError, FileNotFoundError: one of its files is wrong, its images are smaller than `options.size`, or the
        directory holds images of another recipe.
    """
    solving, pipe = options.solving, load(options.model, options.weights)
    shape = latent_shape(pipe.nets, solving.height, solving.width)
    height, width = pipe.image_size(shape)
    if min(height, width) < options.size:
        raise ValueError(
            f"config.size={options.size} exceeds the images of {options.model}, {width}×{height}, which are only ever "
            "reduced; lower it, or raise config.height and config.width"
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
    job = Job(options, pipe, photos, dynamics, solve, json.loads(json.dumps(recipe)), directory)
    check_same(job)
    return job


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


def without_model(job: Job) -> Job:
    """The job as it waits until the rows before it are measured."""
    return dataclasses.replace(job, pipe=None)


def with_model(job: Job) -> Job:
    """The job with its model, loaded again if it waited. Raises ValueError if the model has changed since."""
    if job.pipe is not None:
        return job
    again = prepare(job.options, job.photos, job.directory)
    if again.recipe != job.recipe:
        raise ValueError(f"{job.options.model} has changed since it was checked; run again")
    return again


# ---------------------------------------------------------------- images


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
    fixed = runner.place(job.weights())
    progress = Progress(len(calls), "batches", title="drawing", done=done)
    for call in left:
        drawn, finite = runner(fixed, job.ids(call), job.noise(call))
        check_drawn(finite, [name_image(photo.caption, f"{job.options.seed}, image {photo.id}") for photo in call])
        write(job, call, drawn)
        progress.advance()
    progress.close()


def write(job: Job, photos: Sequence[coco.Photo], drawn: UInt8[np.ndarray, "B H W 3"]) -> None:
    """Reduces images to the measured size, like the photographs, and writes those that do not exist."""
    options = job.options
    for photo, image in zip(photos, drawn, strict=True):
        if not job.path(photo).is_file():
            text = {"prompt": photo.caption, "seed": f"{options.seed}, image {photo.id}", "model": options.model}
            images.save_png(job.path(photo), images.cover(Image.fromarray(image), options.size, options.size), text)


# ---------------------------------------------------------------- the model itself


def measure_model(job: Job, *, straightness_N: int, straightness_count: int, repeats: int) -> dict[str, float]:
    """Seconds an image, and the straightness S of the paths (see `flow.straightness`) with its standard error.

    The seconds are the median of `repeats` runs of the compiled program, from token ids to one image in bytes, on the
    first device of this process. S is that of the first captions, with the row's guidance, whatever its solver.
    """
    nets, alpha, fixed = job.pipe.nets, job.options.solving.alpha, job.weights()
    photos = job.photos[:straightness_count]
    runner = BatchedRunner(make_straightness(nets, job.dynamics, alpha, straightness_N), job.options.batch)
    S, S_error = mean_and_error(runner(fixed, job.ids(photos), job.noise(photos)))
    draw_one = jax.jit(sampling.make_generate(nets, job.solve))
    inputs = fixed[0], job.ids(photos[:1]), fixed[1], job.noise(photos[:1])
    seconds = median_seconds(draw_one, jax.device_put(inputs, jax.local_devices()[0]), repeats)
    return {"seconds": seconds, "S": S, "S_error": S_error}
