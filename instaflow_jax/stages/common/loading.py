"""What several stages' configs say in the same way: which weights to load and how, prompts, sizes, the solver.

Each block of fields has one constructor here, which checks it and turns it into values before anything is loaded.
"""

import dataclasses
import math
import re
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool
from ml_collections import ConfigDict

from instaflow_jax import pipeline
from instaflow_jax.arrays import TokenIds
from instaflow_jax.data import prompt_sources
from instaflow_jax.infra import files, stores
from instaflow_jax.infra.messages import quote
from instaflow_jax.kernels.attention import ATTENTION
from instaflow_jax.models.net import Net
from instaflow_jax.weights.delta import Delta
from instaflow_jax.weights.port import torch_key
from instaflow_jax.weights.tokenizer import Tokenizer

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
EXPORT = "export"  # folder of a training run that holds the trained model, in diffusers layout
PAIRS = "pairs"  # folder of a workdir that holds pairs
# Fields of `configs.common.weights` for a model that the stage itself has trained: what it was loaded with is in it.
AS_EXPORTED = {"loras": "", "weights_variant": "", "delta": {"custom": ""}}


# ---------------------------------------------------------------- weights: the fields of configs.common.weights


@dataclasses.dataclass(frozen=True)
class WeightOptions:
    """How a model's weights are read, changed and computed with; see `configs/common.py:weights`."""

    base: str = ""
    delta: Delta | None = None
    loras: tuple[tuple[str, float], ...] = ()
    weights_variant: str = ""
    dtype: str = "float32"
    attention: str = "auto"
    kernels: str = "auto"
    verify: bool = True


def read_weight_options(config: ConfigDict) -> WeightOptions:
    """The block of `configs.common.weights`. Raises ValueError naming the field and its choices."""
    if config.dtype not in DTYPES:
        raise ValueError(f"config.dtype={config.dtype!r} is not one of {', '.join(DTYPES)}")
    if config.attention not in ATTENTION:
        raise ValueError(f"config.attention={config.attention!r} is not one of {', '.join(ATTENTION)}")
    return WeightOptions(
        base=config.base,
        delta=Delta(**config.delta) if config.delta.custom else None,
        loras=read_scales("loras", config.loras),
        **{name: config[name] for name in ("weights_variant", "dtype", "attention", "kernels", "verify")},
    )


def load(source: str, options: WeightOptions) -> pipeline.Pipeline:
    """Reads the pipeline `source` as `options` say.

    Raises:
      ValueError, FileNotFoundError: naming the file and what is wrong with it; also if a weight is not finite, or if
        a file has changed since its checksum was written.
    """
    if options.verify:
        check_files(source)
    pipe = _read(source, options)
    if _find_bad(pipe.params):
        _blame(source, options)
    return pipe


def _read(source: str, options: WeightOptions) -> pipeline.Pipeline:
    return pipeline.load(
        source,
        variant=options.weights_variant or None,
        base=options.base,
        delta=options.delta,
        loras=options.loras,
        **network_options(options),
    )


def network_options(options: WeightOptions) -> dict[str, Any]:
    """The keywords of `Model.from_config`."""
    return {"dtype": DTYPES[options.dtype], "attention": options.attention, "kernels": options.kernels}


def check_files(source: str) -> None:
    """Raises ValueError naming a file of the directory `source` that differs from its checksum, if it has checksums."""
    folder = Path(pipeline.locate(source)).expanduser()
    damage = files.find_damage(folder) if folder.is_dir() else None
    if damage:
        raise ValueError(
            f"{damage}; make or copy {folder} again, or delete {folder / files.CHECKSUMS} if the change was intended"
        )


def has_export(run: Path) -> bool:
    """Whether the training run in the folder `run` has finished, and exported its model."""
    return (run / EXPORT / "model_index.json").is_file()


def check_finite(source: str, params: Mapping[str, Any]) -> None:
    """Raises ValueError naming `source` and the first of its weights that is NaN or infinite.

    Args:
      params: weights by name, or by network and name.
    """
    bad = _find_bad(params)
    if bad:
        raise ValueError(f"{source}: {bad}; download, export or train it again")


def _find_bad(params: Mapping[str, Any]) -> str:
    """What is wrong with the first weight that is not finite; '' if all are."""
    for name, value in params.items():
        if isinstance(value, Mapping):
            bad = _find_bad(value)
            if bad:
                return f"{name}, {bad}"
        elif not np.isfinite(value).all():
            count = np.size(value) - np.count_nonzero(np.isfinite(value))
            return f"weight {torch_key(name)} is NaN or infinite in {count} of its {np.size(value)} values"
    return ""


def _blame(source: str, options: WeightOptions) -> None:
    """Raises ValueError naming the first file that brings in a weight which is not finite: the model, delta or LoRA."""
    steps = [(source, dataclasses.replace(options, delta=None, loras=()))]
    if options.delta:
        steps.append((f"config.delta.custom={options.delta.custom}", dataclasses.replace(options, loras=())))
    for i, (file, _) in enumerate(options.loras):
        steps.append((file, dataclasses.replace(options, loras=options.loras[: i + 1])))
    for name, changed in steps:
        check_finite(name, {_weight_file(source, net): p for net, p in _read(source, changed).params.items()})


def _weight_file(source: str, net: str) -> str:
    """Where the weights of a network are: its one safetensors file within `source`, or else the network's name."""
    found = list((Path(pipeline.locate(source)).expanduser() / net).glob("*.safetensors"))
    return f"{net}/{found[0].name}" if len(found) == 1 else net


def check_drawn(finite: Bool[np.ndarray, " B"], names: Sequence[str]) -> None:
    """Raises ValueError naming the first image that the networks made of values that are NaN or infinite.

    Args:
      finite: from `sampling.make_generate`.
      names: what identifies each image, from `name_image`.
    """
    bad = np.flatnonzero(~np.asarray(finite))
    if len(bad):
        raise ValueError(
            f"the image of {names[bad[0]]} is NaN or infinite, as are {len(bad) - 1} others of {len(names)}: use "
            "--config.dtype=float32, a lower --config.alpha, or another model"
        )


def name_image(prompt: str, seed: Any) -> str:
    """An image in an error message."""
    return f"prompt {quote(prompt)}, seed {seed}"


def read_scales(field: str, value: str) -> tuple[tuple[str, float], ...]:
    """Files and scales of `config.{field}` from 'FILE=0.8|FILE2'; the scale of a file without one is 1.

    Raises:
      ValueError: a scale is not a number, or too large for float32.
    """
    entries = [entry.partition("=") for entry in value.split("|")]
    pairs = [(file.strip(), scale.strip() if equals else "1") for file, equals, scale in entries if file.strip()]
    for file, scale in pairs:
        if not re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", scale):
            raise ValueError(
                f"config.{field}={value!r}: the scale {scale!r} of {file} is not a number; write FILE=0.8|FILE2=0.5"
            )
    if any(not math.isfinite(np.float32(scale)) for _, scale in pairs):
        raise ValueError(f"config.{field}={value!r}: a scale does not fit into float32; use one near 1")
    return tuple((file, float(scale)) for file, scale in pairs)


# ---------------------------------------------------------------- the solver: the fields of configs.common.solving


@dataclasses.dataclass(frozen=True)
class SolveOptions:
    """How noise becomes latents; see `configs/common.py:solving`."""

    dynamics: str
    solver: str
    N: int
    alpha: float
    negative: str
    height: int
    width: int


def read_solve_options(config: ConfigDict) -> SolveOptions:
    """The block of `configs.common.solving`. Raises ValueError for a negative prompt that guidance would not use."""
    options = SolveOptions(**{field.name: config[field.name] for field in dataclasses.fields(SolveOptions)})
    if options.negative and options.alpha <= 1:
        raise ValueError(
            f"config.negative={quote(options.negative)} has no effect with config.alpha={options.alpha}; "
            "guidance needs alpha > 1"
        )
    return options


def latent_shape(nets: Mapping[str, Net], height: int, width: int) -> tuple[int, int, int]:
    """[h, w, c] of the latents of a `height` × `width` image; 0 means the size the model was made for.

    Raises:
      ValueError: the autoencoder cannot make an image of that size, or the model does not say what it was made for.
    """
    factor, channels = nets["vae"].config.factor, nets["unet"].config.in_channels
    for name, size in (("height", height), ("width", width)):
        if size < 0 or size % factor:
            lower = max(size // factor, 1) * factor
            raise ValueError(
                f"config.{name}={size} is not divisible by the autoencoder's factor {factor}; "
                f"use {lower} or {lower + factor}"
            )
    h, w = (height // factor, width // factor) if height and width else pipeline.latent_shape(nets)[:2]
    return (height // factor or h, width // factor or w, channels)


# ---------------------------------------------------------------- prompts and programs


def sha256_of_tokenizer(tokenizer: Tokenizer) -> str:
    """A hash of all that decides the token ids of a prompt."""
    return files.sha256_of_json([tokenizer.vocab, tokenizer.merges, tokenizer.config])


def tokenize_quietly(tokenizer: Tokenizer, prompts: Sequence[str]) -> TokenIds:
    """Token ids [B, L], without the tokenizer's warning for each of millions of long prompts."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the prompt", category=UserWarning)
        return tokenizer(list(prompts))


def read_prompts(prompts: str) -> list[str]:
    """Prompts from 'one|two', or from a text file with one per line.

    Raises:
      FileNotFoundError: the value ends in .txt and there is no such file.
      ValueError: there is no prompt, or the file is not UTF-8.
    """
    path = stores.local(prompts) if stores.is_address(prompts) else Path(prompts).expanduser()
    if "|" not in prompts and path.suffix.lower() == ".txt":
        if not path.is_file():
            raise FileNotFoundError(f"config.prompts={prompts!r}: no such file")
        lines = list(prompt_sources.text_lines(path))
        if None in lines:
            raise ValueError(
                f"config.prompts={prompts!r}: line {lines.index(None) + 1} of the file is not UTF-8 (perhaps Latin-1); "
                "save the file as UTF-8"
            )
        lines = [line.strip() for line in lines if line and line.strip()]
        if not lines:
            raise ValueError(f"config.prompts={prompts!r}: the file holds no prompt")
        return lines
    if not prompts.strip(" |"):
        raise ValueError(f"config.prompts={prompts!r} holds no prompt; write 'one|two', or name a .txt file")
    return [prompt.strip() for prompt in prompts.split("|")]


def compile_and_log(function: Callable, inputs: tuple) -> Callable:
    """Compiles ahead of time and prints how long that took, so that later timings measure sampling alone."""
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*inputs).compile()
    print(f"compiled in {time.perf_counter() - start:.1f} s", flush=True)
    return compiled
