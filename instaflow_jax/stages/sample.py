"""Stage `sample`: prompts and seeds → PNGs and a grid, with a flow or a teacher."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict

from instaflow_jax import pipeline, sampling
from instaflow_jax.infra import images
from instaflow_jax.infra.messages import slug
from instaflow_jax.infra.progress import Progress
from instaflow_jax.infra.runner import BatchedRunner
from instaflow_jax.stages.common import control
from instaflow_jax.stages.common.loading import (
    SolveOptions,
    check_drawn,
    latent_shape,
    load,
    name_image,
    read_prompts,
    read_solve_options,
    read_weight_options,
)
from instaflow_jax.stages.common.ranges import check_ranges

Job = tuple[int, int]  # row of the prompts, and seed


class Prepared(NamedTuple):
    """What a run needs before it draws.

    Attributes:
      shape: of the latents, [h, w, c].
      params: weights, and the images that the ControlNets see; what `solve` and `draw` take.
    """

    prompts: list[str]
    seeds: tuple[int, ...]
    options: SolveOptions
    pipe: pipeline.Pipeline
    shape: tuple[int, int, int]
    dynamics: sampling.Dynamics
    solve: sampling.Solve
    params: Mapping[str, Any]


def run(config: ConfigDict, workdir: str) -> None:
    """Writes `workdir`/sample/: one PNG for each prompt and seed, and grid.png.

    Raises:
      ValueError, FileNotFoundError: a field of the config, or a file of the model, is wrong.
    """
    ready = prepare(config)
    options, jobs = ready.options, list(itertools.product(range(len(ready.prompts)), ready.seeds))
    kind = "flow" if isinstance(ready.dynamics, sampling.Flow) else "teacher"
    height, width = ready.pipe.image_size(ready.shape)
    print(
        f"{config.model} as a {kind}: {len(jobs)} images of {width}×{height} pixels, N={options.N}, "
        f"alpha={options.alpha:g}",
        flush=True,
    )
    names = ("model", "dynamics", "solver", "N", "alpha", "negative", "dtype", "loras", "controls", "conditions")
    settings = {name: str(config[name]) for name in names}
    if config.delta.custom:
        settings["delta"] = "{scale} * ({custom} - {origin})".format(**config.delta)
    directory = Path(workdir) / "sample"
    directory.mkdir(parents=True, exist_ok=True)
    drawn = draw(
        ready.pipe,
        ready.params,
        ready.solve,
        ready.prompts,
        jobs,
        negative=options.negative,
        shape=ready.shape,
        batch=config.batch,
    )
    write(directory, ready.prompts, ready.seeds, drawn, settings, ending=f"N{options.N}_alpha{options.alpha:g}")


def check(config: ConfigDict, workdir: str) -> None:
    """Every check of `run`, without drawing. Raises as `run` does."""
    prepare(config)


def prepare(config: ConfigDict) -> Prepared:
    """All checks of `run`, and what they read. Raises as `run` does."""
    check_ranges(config)
    prompts, seeds = read_prompts(config.prompts), tuple(config.seeds)
    weights, options = read_weight_options(config), read_solve_options(config)
    pipe = load(config.model, weights)
    shape = latent_shape(pipe.nets, options.height, options.width)
    dynamics = sampling.read_dynamics(pipe.scheduler, pipe.index, options.dynamics)
    controls = control.load_controls(config.controls, pipe, weights)
    size = pipe.image_size(shape)
    conditions = [control.to_condition(image, *size) for image in control.read_conditions(config.conditions, controls)]
    apply = control.make_apply(pipe, controls)
    solve = sampling.make_solve(apply, dynamics, options.solver, options.N, options.alpha)
    params = control.inference_params(pipe, controls, conditions)
    return Prepared(prompts, seeds, options, pipe, shape, dynamics, solve, params)


def draw(
    pipe: pipeline.Pipeline,
    params: Mapping[str, Any],
    solve: sampling.Solve,
    prompts: Sequence[str],
    jobs: Sequence[Job],
    *,
    negative: str,
    shape: tuple[int, int, int],
    batch: int,
) -> UInt8[np.ndarray, "N H W 3"]:
    """One image for each job, up to `batch` on each local device at a time.

    Args:
      params: weights from `control.inference_params`.

    Raises:
      ValueError: naming prompt and seed of an image that is NaN or infinite.
    """
    size = min(batch, -(-len(jobs) // jax.local_device_count()))
    runner = BatchedRunner(sampling.make_generate_rows(pipe.nets, solve), size)
    fixed = runner.place((params, pipe.tokenizer([negative])))
    rows, seeds = np.array(jobs).T
    ids = pipe.tokenizer(prompts)
    seconds = runner.compile(
        fixed,
        jax.ShapeDtypeStruct((runner.rows, *ids.shape[1:]), ids.dtype),
        jax.ShapeDtypeStruct((runner.rows, *shape), np.float32),
    )
    print(f"compiled in {seconds:.1f} s", flush=True)
    drawn, progress = [], Progress(len(jobs), "images")
    for part in runner.batches(len(jobs)):
        noise = np.asarray(sampling.noise(seeds[part], shape))
        part_drawn, finite = runner(fixed, ids[rows[part]], noise)
        check_drawn(finite, [name_image(prompts[row], seed) for row, seed in jobs[part]])
        drawn.append(part_drawn)
        progress.advance(len(drawn[-1]))
    progress.close()
    return np.concatenate(drawn)


def write(
    directory: Path,
    prompts: Sequence[str],
    seeds: Sequence[int],
    drawn: UInt8[np.ndarray, "N H W 3"],
    settings: Mapping[str, str],
    *,
    ending: str,
) -> None:
    """The PNGs, each with all settings that made it, and the grid: one row per prompt, one column per seed."""
    for ((row, prompt), seed), image in zip(itertools.product(enumerate(prompts), seeds), drawn, strict=True):
        text = {**settings, "prompt": prompt, "seed": str(seed)}
        images.save_png(directory / f"{row:03d}_{slug(prompt)}_seed{seed}_{ending}.png", image, text)
    grid = images.grid(
        drawn,
        columns=len(seeds),
        row_labels=prompts,
        column_labels=[f"seed {seed}" for seed in seeds],
        scale=max(1, 128 // drawn.shape[2]),
    )
    images.save_png(directory / "grid.png", grid, {**settings, "prompt": "|".join(prompts), "seed": str(tuple(seeds))})
    print(f"wrote {len(drawn)} images and {directory / 'grid.png'}")
