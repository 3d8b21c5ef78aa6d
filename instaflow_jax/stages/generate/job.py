"""What `generate` needs before its first pair: teacher, prompts, the recipe that names them, the function to compile."""

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int
from ml_collections import ConfigDict

from instaflow_jax import __version__, pipeline, sampling
from instaflow_jax.arrays import Latent, Params, TokenIds
from instaflow_jax.data import noise, prompts
from instaflow_jax.infra.files import sha256_of_json, sha256_of_params
from instaflow_jax.stages.common.loading import latent_shape, load, read_weight_options

Rows = Callable[[Mapping[str, Params], TokenIds, TokenIds, Latent], Latent]


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything fixed by the config.

    Attributes:
      rows: the function to compile, see `make_rows`.
      recipe: all that decides the bytes of the pairs; JSON.
      texts: prompts; pair i belongs to the i-th, counted round.
      report: what cleaning the prompts dropped.
    """

    config: ConfigDict
    pipe: pipeline.Pipeline
    rows: Rows
    recipe: dict[str, Any]
    texts: list[str]
    report: dict[str, int]


def prepare(config: ConfigDict) -> Job:
    """Reads the teacher and the prompts.

    Raises:
      ValueError, FileNotFoundError: a field of the config, or a file, is wrong.
    """
    pipe = load(config.model, read_weight_options(config))
    shape = latent_shape(pipe, config.height, config.width)
    dynamics = sampling.read_dynamics(pipe.scheduler, pipe.index, config.dynamics)
    flow = isinstance(dynamics, sampling.Flow)
    solver = ("euler" if flow else "dpm_solver") if config.solver == "auto" else config.solver
    solve = sampling.make_solve(pipe.nets["unet"].apply, dynamics, solver, config.N, config.alpha)
    texts, report = read_prompts(config)
    recipe = {
        "teacher": {name: sha256_of_params(params) for name, params in pipe.params.items()}
        | {"tokenizer": sha256_of_json([pipe.tokenizer.vocab, pipe.tokenizer.merges, pipe.tokenizer.config])},
        "kind": "flow" if flow else "teacher",
        "dynamics": dataclasses.asdict(dynamics) if flow else pipe.scheduler,
        "solver": solver,
        "N": config.N,
        "alpha": config.alpha,
        "negative": config.negative,
        "dtype": config.dtype,
        "scaling_factor": pipe.nets["vae"].config.scaling_factor,
        "latent_shape": list(shape),
        "tokens": pipe.tokenizer.model_max_length,
        "seed": config.seed,
        "noise": noise.NAME,
        "store_noise": config.store_noise,
        "count": config.count or len(texts),
        "shard_size": config.shard_size,
        "prompts_sha256": prompts.sha256(texts),
    }
    return Job(config, pipe, make_rows(pipe.nets, solve), recipe, texts, report)


def read_prompts(config: ConfigDict) -> prompts.Prompts:
    """The prompts of the config, cleaned."""
    fields = config.prompts.to_dict()
    cleaning = prompts.Cleaning(**fields.pop("cleaning"))
    return prompts.load(**fields, count=config.count, seed=config.seed, cleaning=cleaning)


def about(job: Job) -> dict[str, Any]:
    """What a manifest tells beside the recipe."""
    device = jax.devices()[0]
    return {
        "model": job.config.model,
        "code": f"instaflow_jax {__version__}",
        "jax": jax.__version__,
        "device": f"{device.platform} {device.device_kind}",
        "prompts": job.report,
        "config": job.config.to_dict(),
    }


def make_rows(nets: Mapping[str, Any], solve: sampling.Solve) -> Rows:
    """Text encoder and ODE as one function, `rows(params, null_ids, ids, X0) → X1`.

    Takes null_ids [1, L] (the empty or negative prompt), ids [B, L], X0 float16 [B, h, w, c]; gives float16. The ODE
    starts from what is stored, so that a pair is exact.
    """

    def rows(params, null_ids, ids, X0):
        return solve(params["unet"], X0.astype(jnp.float32), *sampling.encode_text(nets, params, ids, null_ids)).astype(
            jnp.float16
        )

    return rows


def prompt(job: Job, number: int) -> str:
    return job.texts[number % len(job.texts)]


def tokens(job: Job, numbers: Sequence[int]) -> Int[np.ndarray, "B L"]:
    """Token ids; prompts that are cut are met by the million here, so nothing is said of each."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the prompt", category=UserWarning)
        return job.pipe.tokenizer([prompt(job, number) for number in numbers])
