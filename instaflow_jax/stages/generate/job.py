"""The work of `generate`: teacher, prompts, the recipe that identifies them, and the program that makes pairs."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float16, Int

from instaflow_jax import __version__, pipeline, sampling
from instaflow_jax.arrays import AnyArray, Latent, Params, TokenIds
from instaflow_jax.data import noise, prompts
from instaflow_jax.infra.files import sha256_of_params
from instaflow_jax.infra.messages import quote
from instaflow_jax.infra.runner import BatchedRunner
from instaflow_jax.stages.common.loading import (
    SolveOptions,
    WeightOptions,
    latent_shape,
    sha256_of_tokenizer,
    tokenize_quietly,
)
from instaflow_jax.stages.common.loading import load as load_pipeline

Fixed = tuple[Mapping[str, Params], TokenIds]  # networks' weights and the ids [1, L] of the empty or negative prompt
MakeLatents = Callable[[Fixed, TokenIds, Latent], Float16[AnyArray, "B h w c"]]


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything that the config fixes.

    Attributes:
      model: where the teacher was read from.
      make_latents: the function to compile; see `make_latents_function`.
      recipe: everything that decides the bytes of the pairs, as JSON.
      prompts: texts and the cleaning's report; pair i uses prompt i, modulo their number.
    """

    model: str
    pipe: pipeline.Pipeline
    make_latents: MakeLatents
    recipe: dict[str, Any]
    prompts: prompts.Prompts

    def prompt(self, number: int) -> str:
        """The prompt of a pair."""
        return self.prompts.texts[number % len(self.prompts.texts)]

    def ids(self, numbers: Sequence[int]) -> Int[np.ndarray, "B L"]:
        """Token ids of the pairs' prompts."""
        return tokenize_quietly(self.pipe.tokenizer, [self.prompt(number) for number in numbers])

    def noise(self, numbers: Sequence[int]) -> Float16[np.ndarray, "B h w c"]:
        """X0 of the pairs."""
        return np.stack([noise.noise(self.recipe["seed"], i, self.recipe["latent_shape"]) for i in numbers])

    def about(self) -> dict[str, Any]:
        """What a manifest records beside the recipe and the config."""
        device = jax.devices()[0]
        return {
            "model": self.model,
            "code": f"instaflow_jax {__version__}",
            "jax": jax.__version__,
            "device": f"{device.platform} {device.device_kind}",
            "prompts": self.prompts.report,
        }


def load(
    model: str,
    weights: WeightOptions,
    options: SolveOptions,
    found: prompts.Prompts,
    *,
    count: int,
    seed: int,
    shard_size: int,
    store_noise: bool,
    pipe: pipeline.Pipeline | None = None,
) -> Job:
    """Reads the teacher `model` and writes down the recipe.

    Args:
      found: the prompts.
      count: number of pairs; 0 means one per prompt.
      seed, shard_size, store_noise: see `configs/generate.py`.
      pipe: the teacher, if it is not to be read from `model`.

    Raises:
      ValueError, FileNotFoundError: an option, or a file of the teacher, is wrong.
    """
    pipe = pipe or load_pipeline(model, weights)
    shape = latent_shape(pipe.nets, options.height, options.width)
    dynamics = sampling.read_dynamics(pipe.scheduler, pipe.index, options.dynamics)
    flow = isinstance(dynamics, sampling.Flow)
    solver = ("euler" if flow else "dpm_solver") if options.solver == "auto" else options.solver
    solve = sampling.make_solve(pipe.nets["unet"].apply, dynamics, solver, options.N, options.alpha)
    tokenizer = pipe.tokenizer
    recipe = {  # version 0.1's names, because shards on disk carry the hash of the recipe
        "teacher": {name: sha256_of_params(params) for name, params in pipe.params.items()}
        | {"tokenizer": sha256_of_tokenizer(tokenizer)},
        "kind": "flow" if flow else "teacher",
        "dynamics": {"factor": dynamics.factor, "steps": dynamics.num_timesteps} if flow else pipe.scheduler,
        "solver": solver,
        "N": options.N,
        "alpha": options.alpha,
        "negative": options.negative,
        "dtype": weights.dtype,
        "scaling_factor": pipe.nets["vae"].config.scaling_factor,
        "latent_shape": list(shape),
        "tokens": tokenizer.model_max_length,
        "seed": seed,
        "noise": noise.NAME,
        "store_noise": store_noise,
        "count": count or len(found.texts),
        "shard_size": shard_size,
        "prompts_sha256": prompts.sha256(found.texts),
    }
    return Job(model, pipe, make_latents_function(pipe.nets, solve), recipe, found)


def make_latents_function(nets: Mapping[str, Any], solve: sampling.Solve) -> MakeLatents:
    """Text encoder and ODE as one function, `make_latents((params, null_ids), ids, X0) → X1`.

    Takes null_ids [1, L] (the empty or negative prompt), ids [B, L] and X0 float16 [B, h, w, c]; returns float16. The
    ODE starts from the stored float16 values, so that a pair is exact.
    """

    def make_latents(fixed, ids, X0):
        params, null_ids = fixed
        text, null = sampling.encode_text(nets, params, ids, null_ids)
        return solve(params["unet"], X0.astype(jnp.float32), text, null).astype(jnp.float16)

    return make_latents


# ---------------------------------------------------------------- running it


@dataclasses.dataclass(frozen=True)
class Generated:
    """Pairs in memory."""

    numbers: Sequence[int]
    ids: Int[np.ndarray, "B L"]
    X0: Float16[np.ndarray, "B h w c"]
    X1: Float16[np.ndarray, "B h w c"]


def compile_program(job: Job, batch: int) -> tuple[BatchedRunner, Fixed, float]:
    """`job.make_latents` compiled for all local devices with `batch` pairs each, and what `start` takes as `fixed`.

    The third value is the seconds that compiling took.
    """
    runner, recipe = BatchedRunner(job.make_latents, batch), job.recipe
    read = {name: job.pipe.params[name] for name in ("unet", "text_encoder")}
    weights = pipeline.inference_params(job.pipe.nets, read)
    fixed = runner.place((weights, job.pipe.tokenizer([recipe["negative"]])))
    ids = jax.ShapeDtypeStruct((runner.rows, recipe["tokens"]), np.int32)
    X0 = jax.ShapeDtypeStruct((runner.rows, *recipe["latent_shape"]), np.float16)
    return runner, fixed, runner.compile(fixed, ids, X0)


def generate(job: Job, runner: BatchedRunner, fixed: Fixed, numbers: range) -> Iterator[Generated]:
    """The pairs of these numbers, call by call; the devices compute the next call while the caller uses this one.

    Args:
      runner, fixed: from `compile_program`.

    Raises:
      ValueError: a pair is not finite.
    """
    running = None
    for rows in runner.batches(len(numbers)):
        ids, X0 = job.ids(numbers[rows]), job.noise(numbers[rows])
        previous, running = running, (numbers[rows], ids, X0, runner.start(fixed, ids, X0))
        if previous is not None:
            yield fetch(job, *previous)
    yield fetch(job, *running)


def fetch(job: Job, numbers: range, ids, X0, X1: jax.Array) -> Generated:
    """Waits for a call and cuts off its padding. Raises ValueError if a pair is not finite."""
    X1 = np.asarray(X1)[: len(numbers)]
    bad = [i for i, row in zip(numbers, X1, strict=True) if not np.isfinite(row).all()]
    if bad:
        raise ValueError(
            f"pair {bad[0]} ({quote(job.prompt(bad[0]))}) is not finite in float16, nor are {len(bad) - 1} more "
            f"of {len(numbers)}: lower alpha={job.recipe['alpha']:g}, or set dtype='float32'"
        )
    return Generated(numbers, ids, X0, X1)
