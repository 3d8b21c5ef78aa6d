"""AdamW with global-norm clipping, and the learning-rate schedules."""

import inspect
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from instaflow_jax.arrays import Params, Scalar


def constant(*, peak: float, warmup_steps: int) -> optax.Schedule:
    """A linear warm-up from 0 to peak over warmup_steps, then constant."""
    return optax.warmup_constant_schedule(0.0, peak, warmup_steps) if warmup_steps else optax.constant_schedule(peak)


def cosine(*, peak: float, warmup_steps: int, total_steps: int, end: float) -> optax.Schedule:
    """A linear warm-up to peak, a cosine decay to end at total_steps, then constant.

    Raises:
      ValueError: the warm-up leaves no step for the decay.
    """
    if warmup_steps >= total_steps:
        raise ValueError(f"warmup_steps={warmup_steps} must be below total_steps={total_steps}: use a shorter warm-up")
    return optax.warmup_cosine_decay_schedule(0.0 if warmup_steps else peak, peak, warmup_steps, total_steps, end)


SCHEDULES = {"constant": constant, "cosine": cosine}


def make_schedule(name: str, **fields) -> optax.Schedule:
    """The schedule called `name` ('constant' or 'cosine'); `fields` are its keyword arguments."""
    if name not in SCHEDULES:
        raise ValueError(f"schedule={name!r} is unknown: use one of {sorted(SCHEDULES)}")
    taken = inspect.signature(SCHEDULES[name]).parameters
    if taken.keys() != fields.keys():
        raise ValueError(
            f"config.schedule.name={name!r} takes the fields {', '.join(taken)}, but this config has "
            f"{', '.join(fields)}: use the schedule of the config"
        )
    return SCHEDULES[name](**fields)


def make_optimizer(
    schedule: optax.Schedule, *, b1: float, b2: float, eps: float, weight_decay: float, clip: float
) -> optax.GradientTransformationExtraArgs:
    """AdamW (arXiv 1711.05101) after clipping of the gradient's global norm, which `update` takes as `norm`.

    Weight decay applies to arrays of two or more axes: kernels and embeddings, not biases or norm scales.

    Args:
      schedule: learning rate by number of updates; skipped steps do not count.
      clip: largest global norm of the gradient; `inf` turns clipping off.
    """
    return optax.chain(
        clip_by(clip),
        optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
        optax.add_decayed_weights(weight_decay, mask=is_matrix),
        scale_by_schedule(schedule),
    )


def clip_by(largest: float) -> optax.GradientTransformationExtraArgs:
    """`optax.clip_by_global_norm` of a norm that is known already, because computing it reads all gradients."""

    def update(updates, state, params=None, *, norm: Scalar):
        return jax.tree.map(lambda u: jnp.where(norm < largest, u, u / norm * largest), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def is_matrix(params: Params) -> dict[str, bool]:
    """Which arrays have two or more axes."""
    return jax.tree.map(lambda p: p.ndim >= 2, params)


class ScheduleState(NamedTuple):
    """The number of updates, and the last learning rate, kept for the metrics."""

    count: Int[Array, ""]
    learning_rate: Scalar


def scale_by_schedule(schedule: optax.Schedule) -> optax.GradientTransformation:
    """Multiplies by minus the learning rate and stores that rate in its state."""

    def init(params):
        return ScheduleState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32))

    def update(updates, state, params=None):
        rate = jnp.asarray(schedule(state.count), jnp.float32)
        return jax.tree.map(lambda u: -rate * u, updates), ScheduleState(state.count + 1, rate)

    return optax.GradientTransformation(init, update)


def learning_rate(opt_state: optax.OptState) -> Scalar:
    """The learning rate of the last update by an optimizer of `make_optimizer`."""
    return optax.tree.get(opt_state, "learning_rate")
