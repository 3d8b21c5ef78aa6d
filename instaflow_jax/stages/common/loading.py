"""Loading models and reading what several stages' configs share."""

import re
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from instaflow_jax import pipeline
from instaflow_jax.weights.delta import Delta

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


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


def compile_aloud(function: Callable, inputs: tuple) -> Callable:
    """Compiles ahead of time, so that the seconds shown later are those of sampling alone."""
    began = time.perf_counter()
    compiled = jax.jit(function).lower(*inputs).compile()
    print(f"compiled in {time.perf_counter() - began:.1f} s", flush=True)
    return compiled
