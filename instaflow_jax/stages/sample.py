"""Stage `sample`: prompts and seeds → PNGs and a grid, by whichever model the directory holds."""

import itertools
import re
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from instaflow_jax import sampling
from instaflow_jax.infra import images
from instaflow_jax.models import pipeline
from instaflow_jax.models.merge import Delta

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def run(config: ConfigDict, workdir: str) -> None:
    """Writes `workdir`/sample/: one PNG for each prompt and seed, and grid.png.

    Raises:
      ValueError, FileNotFoundError: a field of the config, or a file of the model, is wrong.
    """
    prompts = read_prompts(config.prompts)
    check(config)
    pipe = load(config, config.model)
    shape = latent_shape(pipe, config.height, config.width)
    dynamics = sampling.read_dynamics(pipe.scheduler, pipe.index, config.kind)
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


def load(config: ConfigDict, source: str) -> pipeline.Pipeline:
    """The pipeline `source` with the changes of weights that the config asks for, computing as the config says.

    Raises:
      ValueError, FileNotFoundError: a field of the config, or a file, is wrong.
    """
    delta = Delta(**config.delta) if config.delta.custom else None
    return pipeline.load(
        source,
        variant=config.weights_variant or None,
        dtype=DTYPES[config.dtype],
        attention=config.attention,
        base=config.base,
        delta=delta,
        loras=read_loras(config.loras),
    )


def read_loras(loras: str) -> list[tuple[str, float]]:
    """Files and scales from 'FILE=0.8|FILE2'; a file without a scale has 1.

    Raises:
      ValueError: a scale is no number.
    """
    pairs = [
        (file.strip(), scale.strip() if equals else "1")
        for file, equals, scale in (entry.partition("=") for entry in loras.split("|"))
        if file.strip()
    ]
    for file, scale in pairs:
        if not re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", scale):
            raise ValueError(
                f"config.loras={loras!r}: the scale {scale!r} of {file} is no number; write FILE=0.8|FILE2=0.5"
            )
    return [(file, float(scale)) for file, scale in pairs]


def check(config: ConfigDict) -> None:
    """Cross-field checks, before anything is loaded."""
    check_dtype(config)
    if config.batch < 1:
        raise ValueError(f"config.batch={config.batch} must be at least 1")
    if not config.seeds or min(config.seeds) < 0:
        raise ValueError(f"config.seeds={config.seeds} must name at least one seed, none of them negative")
    check_guidance(config)


def check_dtype(config: ConfigDict) -> None:
    """ValueError unless `config.dtype` is a type that networks compute in."""
    if config.dtype not in DTYPES:
        raise ValueError(f"config.dtype={config.dtype!r} is not one of {', '.join(DTYPES)}")


def check_guidance(config: ConfigDict) -> None:
    """ValueError for a negative prompt that no guidance would look at."""
    if config.negative and config.alpha <= 1:
        raise ValueError(
            f"config.negative={config.negative!r} has no effect with config.alpha={config.alpha}; "
            "guidance needs alpha > 1"
        )


def read_prompts(prompts: str) -> list[str]:
    """Prompts from 'one|two', or from a text file with one a line.

    Raises:
      FileNotFoundError: it looks like a file's name, and there is none.
      ValueError: the file holds no prompt.
    """
    path = Path(prompts)
    if "|" not in prompts and path.suffix == ".txt":
        if not path.is_file():
            raise FileNotFoundError(f"config.prompts={prompts!r}: no such file")
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        if not any(lines):
            raise ValueError(f"config.prompts={prompts!r}: the file holds no prompt")
        return [line for line in lines if line]
    return [prompt.strip() for prompt in prompts.split("|")]


def latent_shape(pipe: pipeline.Pipeline, height: int, width: int) -> tuple[int, int, int]:
    """[h, w, c] of the latents for a picture of that size; 0 stands for the size the model was made for.

    Raises:
      ValueError: the autoencoder cannot make a picture of that size.
    """
    factor, (h, w, channels) = pipe.nets["vae"].config.factor, pipe.latent_shape
    for name, size in (("height", height), ("width", width)):
        if size < 0 or size % factor:
            lower = max(size // factor, 1) * factor
            raise ValueError(
                f"config.{name}={size} is not divisible by the autoencoder's factor {factor}; "
                f"use {lower} or {lower + factor}"
            )
    return (height // factor or h, width // factor or w, channels)


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
        generate = generate or compile_aloud(sampling.make_generate(pipe.nets, solve), inputs)
        began = time.perf_counter()
        pictures += list(np.asarray(generate(*inputs))[: len(batch)])
        print(
            f"{len(pictures)}/{len(jobs)} pictures, {time.perf_counter() - began:.2f} s a batch of {size}", flush=True
        )
    return pictures


def compile_aloud(function: Callable, inputs: tuple) -> Callable:
    """Compiles ahead of time, so that the seconds shown later are those of sampling alone."""
    began = time.perf_counter()
    compiled = jax.jit(function).lower(*inputs).compile()
    print(f"compiled in {time.perf_counter() - began:.1f} s", flush=True)
    return compiled


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
