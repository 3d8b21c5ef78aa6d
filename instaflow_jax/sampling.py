"""Text → latents → image as one function, and what a model directory's scheduler says about its ODE."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Integer

from instaflow_jax import flow, solvers, teacher
from instaflow_jax.arrays import AnyArray, Context, Latent, NullContext, NullIds, Params, Scalar, TokenIds
from instaflow_jax.infra.images import to_uint8
from instaflow_jax.solvers import Multistep

Solve = Callable[[Params, Latent, Context, NullContext], Latent]
DYNAMICS = ("auto", "flow", "teacher")  # what `config.dynamics` may be


@dataclass(frozen=True)
class Flow:
    """A network that predicts a velocity.

    Attributes:
      factor: X1 − X0 is `factor` times its output: 1 for the released checkpoints, −1 for diffusers' noise − data.
      num_timesteps: its timestep at noise (`flow.timestep`).
    """

    factor: float
    num_timesteps: int


Dynamics = Flow | teacher.Schedule


def read_dynamics(scheduler: Mapping[str, Any], index: Mapping[str, Any], dynamics: str) -> Dynamics:
    """Whether a directory holds a flow or a teacher, and its parameters.

    A directory holds a flow if its pipeline class is the released code's, or if its scheduler is one of diffusers' for
    flows: `FlowMatchEulerDiscreteScheduler`, or any with `prediction_type="flow_prediction"`. Everything else is a
    noise predictor. The released InstaFlow files still have the scheduler of the SD they started from, so `dynamics`
    can overrule the files.

    Args:
      scheduler: `scheduler_config.json`.
      index: `model_index.json`.
      dynamics: "auto", "flow" or "teacher".

    Raises:
      ValueError: unknown `dynamics`, a shifted flow, or a scheduler that `teacher.read_schedule` refuses.
    """
    if dynamics not in DYNAMICS:
        raise ValueError(f"dynamics={dynamics!r} is not one of {', '.join(DYNAMICS)}")
    name = scheduler.get("_class_name")
    diffusers_flow = name == "FlowMatchEulerDiscreteScheduler" or scheduler.get("prediction_type") == "flow_prediction"
    released = index.get("_class_name") in ("RectifiedFlowPipeline", "InstaFlowPipeline")
    if dynamics == "teacher" or (dynamics == "auto" and not diffusers_flow and not released):
        return teacher.read_schedule(scheduler)
    shift = scheduler.get("shift", scheduler.get("flow_shift", 1.0))
    if diffusers_flow and abs(shift - 1.0) > 1e-6:
        raise ValueError(f"scheduler config: shift={shift} is not supported; rectified flow has no time shift (1.0)")
    T = scheduler.get("num_train_timesteps", 1000)
    if diffusers_flow and scheduler.get("use_flow_sigmas"):  # these sigmas start at 1 − 1/T instead of 1
        return Flow(1 / T - 1, T - 1)
    return Flow(-1 if diffusers_flow else 1, T)


def solver_table(dynamics: Dynamics, solver: str, N: int) -> Multistep:
    """N steps of a solver as a table for the bare network.

    Args:
      solver: "euler" or "heun" for a flow, "dpm_solver" or "ddim" for a teacher; "auto" takes the first.

    Raises:
      ValueError: the solver does not fit the dynamics, or N is not a possible number of steps.
    """
    is_flow = isinstance(dynamics, Flow)
    known = solvers.FLOW_SOLVERS if is_flow else solvers.TEACHER_SOLVERS
    name = next(iter(known)) if solver == "auto" else solver
    if name not in known:
        raise ValueError(
            f"solver={name!r} does not fit a {'flow' if is_flow else 'teacher'}; use auto or one of {', '.join(known)}"
        )
    if is_flow:
        return solvers.for_flow_network(known[name](N), dynamics.factor, dynamics.num_timesteps)
    return known[name](dynamics, N)


def make_solve(apply: Callable, dynamics: Dynamics, solver: str, N: int, alpha: float) -> Solve:
    """The ODE from noise to latents, `solve(params, X0, text, null) → X1`.

    Args:
      apply: the network, `apply(params, Z, tau, context)`.
      dynamics: from `read_dynamics`.
      solver, N: see `solver_table`. Raises as it does.
      alpha: guidance (Eq. 7); 1 or less runs the text branch alone.
    """
    table = solver_table(dynamics, solver, N)

    def solve(params, X0, text, null):
        return solvers.integrate(flow.guided(functools.partial(apply, params), text, null, alpha), table, X0)

    return solve


def make_generate(
    nets: Mapping[str, Any], solve: Solve
) -> Callable[[Mapping[str, Params], TokenIds, TokenIds, Latent], tuple[jax.Array, jax.Array]]:
    """Text encoder, ODE and decoder as one function to compile, `generate(params, ids, null_ids, X0)`.

    Takes ids [B, L], null_ids [1, L] (the empty or negative prompt) and X0 [B, h, w, c]. Returns uint8 images
    [B, H, W, 3], and [B] whether each was finite; see `to_uint8_checked`.
    """

    def generate(params, ids, null_ids, X0):
        X1 = solve(params["unet"], X0, *encode_text(nets, params, ids, null_ids))
        return to_uint8_checked(nets["vae"].apply(params["vae"], X1, method="decode"))

    return generate


def make_generate_rows(nets: Mapping[str, Any], solve: Solve) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """`make_generate` as a `BatchedRunner` takes it: `generate((params, null_ids), ids, X0)`."""
    generate = make_generate(nets, solve)
    return lambda fixed, ids, X0: generate(fixed[0], ids, fixed[1], X0)


def to_uint8_checked(pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Images in bytes, where NaN becomes black, and for each image whether all its pixels [B, H, W, 3] were finite."""
    return to_uint8(pixels), jnp.isfinite(pixels).all((1, 2, 3))


def encode_text(
    nets: Mapping[str, Any], params: Mapping[str, Params], ids: TokenIds, null_ids: NullIds
) -> tuple[Context, NullContext]:
    """The embeddings a solver is conditioned on: ids [B, L] and null_ids [1, L] → text [B, L, D] and null [1, L, D]."""
    both = nets["text_encoder"].apply(params["text_encoder"], jnp.concatenate([null_ids, ids])).last_hidden_state
    return both[1:], both[:1]


def noise(seeds: Integer[AnyArray, " B"], shape: tuple[int, int, int]) -> Latent:
    """X0 for each seed, [len(seeds), *shape]; independent of the batch that a seed is in.

    Raises:
      ValueError: a seed of a numpy array does not fit into 32 bits, where it would silently become another one.
    """
    if isinstance(seeds, np.ndarray) and seeds.size and not (seeds.min() >= 0 and seeds.max() < 2**32):
        raise ValueError(f"seeds from {seeds.min()} to {seeds.max()}: use seeds from 0 to {2**32 - 1}")
    return jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), shape))(jnp.asarray(seeds, jnp.uint32))


def slerp(A: Latent, B: Latent, position: float | Scalar) -> Latent:
    """Spherical interpolation (Shoemake 1985) of each pair of noises, [B, h, w, c]: A at position 0, B at 1.

    Between independent noises the norm stays that of noise, where a straight line would shrink it by up to √½. Nearly
    parallel pairs are interpolated linearly.
    """

    def dot(X, Y):
        return jnp.sum(X * Y, (1, 2, 3), keepdims=True)

    angle = jnp.arccos(jnp.clip(dot(A, B) / jnp.sqrt(dot(A, A) * dot(B, B)), -1, 1))
    parallel = jnp.sin(angle) < 1e-3
    sine = jnp.where(parallel, 1, jnp.sin(angle))

    def weight(share):
        return jnp.where(parallel, share, jnp.sin(share * angle) / sine)

    return weight(1 - position) * A + weight(position) * B
