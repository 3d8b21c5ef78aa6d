"""From prompts to pictures: what a directory's scheduler says, and one program for text, network and decoder."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from instaflow_jax import flow, teacher
from instaflow_jax.arrays import Context, Latent, Params, Tokens

Solve = Callable[[Params, Latent, Context, Context], Latent]
KINDS = ("auto", "flow", "teacher")


@dataclass(frozen=True)
class Flow:
    """A network that predicts a velocity.

    Attributes:
      factor: on its output, gives X1 − X0: 1 for the released checkpoints, −1 for diffusers' noise − data.
      steps: what its clock counts at noise.
    """

    factor: float
    steps: int


Dynamics = Flow | teacher.Schedule
SOLVERS = {"flow": {"euler": flow.euler, "heun": flow.heun}, "teacher": teacher.SOLVERS}


def read_dynamics(scheduler: Mapping[str, Any], index: Mapping[str, Any], kind: str) -> Dynamics:
    """Whether a directory holds a flow or a teacher.

    A flow says so by the pipeline class of the released code, or by a scheduler of diffusers that expects one:
    `FlowMatchEulerDiscreteScheduler`, or any with `prediction_type="flow_prediction"`. All else is a noise predictor.
    The released InstaFlow files carry the scheduler of the SD they began as, hence `kind` to overrule.

    Args:
      scheduler: `scheduler_config.json`.
      index: `model_index.json`.
      kind: "auto", "flow" or "teacher".

    Raises:
      ValueError: unknown kind; a shifted flow; a scheduler that `teacher.read_schedule` refuses.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is not one of {', '.join(KINDS)}")
    name = scheduler.get("_class_name")
    diffusers_flow = name == "FlowMatchEulerDiscreteScheduler" or scheduler.get("prediction_type") == "flow_prediction"
    released = index.get("_class_name") in ("RectifiedFlowPipeline", "InstaFlowPipeline")
    if kind == "teacher" or (kind == "auto" and not diffusers_flow and not released):
        return teacher.read_schedule(scheduler)
    shift = scheduler.get("shift", scheduler.get("flow_shift", 1.0))
    if diffusers_flow and abs(shift - 1.0) > 1e-6:
        raise ValueError(
            f"scheduler config: shift={shift} is not supported; rectified flow's clock is not shifted (1.0)"
        )
    steps = scheduler.get("num_train_timesteps", 1000)
    if diffusers_flow and scheduler.get("use_flow_sigmas"):  # these begin 1/steps below 1, in time and in length
        return Flow(1 / steps - 1, steps - 1)
    return Flow(-1 if diffusers_flow else 1, steps)


def make_solve(apply: Callable, dynamics: Dynamics, solver: str, N: int, alpha: float) -> Solve:
    """The ODE from noise to latents, `solve(params, X0, text, null) → X1`.

    Args:
      apply: the network, `apply(params, Z, tau, context)`.
      dynamics: from `read_dynamics`.
      solver: "euler" or "heun" for a flow, "dpm_solver" or "ddim" for a teacher; "auto" takes the first.
      N: steps.
      alpha: guidance (Eq. 7); 1 or less runs the text branch alone.

    Raises:
      ValueError: the solver does not fit the dynamics, or N is not a possible number of steps.
    """
    if isinstance(dynamics, Flow):
        integrate = _choose(SOLVERS["flow"], "flow", "euler" if solver == "auto" else solver)

        def solve_flow(params, X0, text, null):
            def network(Z, tau, context):
                return dynamics.factor * apply(params, Z, tau, context)

            return integrate(flow.flow_velocity(network, text, null, alpha, dynamics.steps), X0, N)

        return solve_flow
    table = _choose(SOLVERS["teacher"], "teacher", "dpm_solver" if solver == "auto" else solver)(dynamics, N)

    def solve_teacher(params, X0, text, null):
        def network(x, tau, context):
            return apply(params, x, tau, context)

        return teacher.integrate(flow.guided(network, text, null, alpha), table, X0)

    return solve_teacher


def _choose(solvers: Mapping[str, Callable], kind: str, name: str) -> Callable:
    if name not in solvers:
        raise ValueError(f"solver={name!r} does not fit a {kind}; choose auto or one of {', '.join(solvers)}")
    return solvers[name]


def make_generate(
    nets: Mapping[str, Any], solve: Solve
) -> Callable[[Mapping[str, Params], Tokens, Tokens, Latent], jax.Array]:
    """Text encoder, ODE and decoder as one function to compile, `generate(params, ids, null_ids, X0) → uint8`.

    Takes ids [B, L], null_ids [1, L] (the empty or negative prompt), X0 [B, h, w, c]; gives images [B, H, W, 3].
    """

    def generate(params, ids, null_ids, X0):
        X1 = solve(params["unet"], X0, *read_text(nets, params, ids, null_ids))
        return to_uint8(nets["vae"].apply(params["vae"], X1, method="decode"))

    return generate


def read_text(
    nets: Mapping[str, Any], params: Mapping[str, Params], ids: Tokens, null_ids: Tokens
) -> tuple[Context, Context]:
    """What a solver is conditioned on: ids [B, L] and null_ids [1, L] → text [B, L, D] and null [1, L, D]."""
    both = nets["text_encoder"].apply(params["text_encoder"], jnp.concatenate([null_ids, ids])).last_hidden_state
    return both[1:], both[:1]


def to_uint8(pixels: jax.Array) -> jax.Array:
    """Pixels in [−1, 1], clipped and rounded, as bytes."""
    return jnp.round(jnp.clip(pixels / 2 + 0.5, 0, 1) * 255).astype(jnp.uint8)


def noise(seeds: jax.Array, shape: tuple[int, int, int]) -> Latent:
    """X0 for each seed, [len(seeds), *shape]; a seed's noise does not depend on the batch it is drawn in."""
    return jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), shape))(jnp.asarray(seeds, jnp.uint32))
