"""Stage `sample`: prompts and seeds → PNGs and a grid, by whichever model the directory holds."""

import itertools
import re
import time
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from instaflow_jax import pipeline, sampling
from instaflow_jax.infra import images
from instaflow_jax.stages.common.loading import (
    compile_and_log,
    latent_shape,
    load,
    read_prompts,
    read_solve_options,
    read_weight_options,
)


def run(config: ConfigDict, workdir: str) -> None:
    """Writes `workdir`/sample/: one PNG for each prompt and seed, and grid.png.

    Raises:
      ValueError, FileNotFoundError: a field of the config, or a file of the model, is wrong.
    """
    prompts = read_prompts(config.prompts)
    check(config)
    pipe = load(config.model, read_weight_options(config))
    shape = latent_shape(pipe, config.height, config.width)
    dynamics = sampling.read_dynamics(pipe.scheduler, pipe.index, config.dynamics)
    solve = sampling.make_solve(pipe.nets["unet"].apply, dynamics, config.solver, config.N, config.alpha)
    jobs = list(itertools.product(range(len(prompts)), config.seeds))
    print(
        f"{config.model} as a {'flow' if isinstance(dynamics, sampling.Flow) else 'teacher'}: {len(jobs)} pictures "
        f"of {shape[1] * pipe.nets['vae'].config.factor}×{shape[0] * pipe.nets['vae'].config.factor} pixels, "
        f"{config.N} steps, alpha {config.alpha:g}",
        flush=True,
    )
    directory = Path(workdir) / "sample"
    directory.mkdir(parents=True, exist_ok=True)
    pictures = draw(pipe, solve, prompts, config, jobs, shape)
    write(directory, config, prompts, jobs, pictures)


def check(config: ConfigDict) -> None:
    """Cross-field checks, before anything is loaded."""
    read_weight_options(config)
    if config.batch < 1:
        raise ValueError(f"config.batch={config.batch} must be at least 1")
    if not config.seeds or min(config.seeds) < 0:
        raise ValueError(f"config.seeds={config.seeds} must name at least one seed, none of them negative")
    read_solve_options(config)


def draw(
    pipe: pipeline.Pipeline,
    solve: sampling.Solve,
    prompts: list[str],
    config: ConfigDict,
    jobs: list,
    shape: tuple[int, int, int],
) -> list[np.ndarray]:
    """A uint8 picture [H, W, 3] for each job (row of `prompts`, seed), `config.batch` at a time by one program."""
    params, null, ids = jax.device_put(pipe.params), pipe.tokenizer([config.negative]), pipe.tokenizer(prompts)
    size = min(config.batch, len(jobs))
    generate, pictures = None, []
    for start in range(0, len(jobs), size):
        batch = jobs[start : start + size]
        rows, seeds = np.array(batch + batch[:1] * (size - len(batch))).T  # the last batch is filled up
        inputs = (params, ids[rows], null, sampling.noise(seeds, shape))
        generate = generate or compile_and_log(sampling.make_generate(pipe.nets, solve), inputs)
        began = time.perf_counter()
        pictures += list(np.asarray(generate(*inputs))[: len(batch)])
        print(
            f"{len(pictures)}/{len(jobs)} pictures, {time.perf_counter() - began:.2f} s a batch of {size}", flush=True
        )
    return pictures


def write(directory: Path, config: ConfigDict, prompts: list[str], jobs: list, pictures: list[np.ndarray]) -> None:
    """The PNGs, each with all it takes to make it again, and the grid: a row a prompt, a column a seed."""
    settings = {
        name: str(config[name]) for name in ("model", "kind", "solver", "N", "alpha", "negative", "dtype", "loras")
    }
    if config.delta.custom:
        settings["delta"] = "{scale} * ({custom} - {origin})".format(**config.delta)
    for (row, seed), picture in zip(jobs, pictures, strict=True):
        slug = re.sub(r"\W+", "-", prompts[row].lower()).strip("-")[:60]
        name = f"{row:03d}_{slug}_seed{seed}_N{config.N}_alpha{config.alpha:g}.png"
        images.save_png(directory / name, picture, settings | {"prompt": prompts[row], "seed": str(seed)})
    grid = images.grid(
        np.stack(pictures),
        columns=len(config.seeds),
        row_labels=prompts,
        column_labels=[f"seed {seed}" for seed in config.seeds],
        scale=max(1, 128 // pictures[0].shape[1]),
    )
    images.save_png(directory / "grid.png", grid, settings | {"prompt": "|".join(prompts), "seed": str(config.seeds)})
    print(f"wrote {len(pictures)} pictures and {directory / 'grid.png'}")
