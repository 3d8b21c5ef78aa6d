"""AdamW with global-norm clipping, and the learning-rate schedules."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from instaflow_jax.arrays import Params, Scalar


def constant(*, peak: float, warmup_steps: int) -> optax.Schedule:
    """A straight warm-up from 0 to peak over warmup_steps, then peak for ever."""
    return optax.warmup_constant_schedule(0.0, peak, warmup_steps) if warmup_steps else optax.constant_schedule(peak)


def cosine(*, peak: float, warmup_steps: int, total_steps: int, end: float) -> optax.Schedule:
    """A straight warm-up to peak, then half a cosine down to end at total_steps, then end for ever.

    Raises:
      ValueError: the warm-up leaves no step to the cosine.
    """
    if warmup_steps >= total_steps:
        raise ValueError(f"warmup_steps={warmup_steps} must be below total_steps={total_steps}: shorten the warm-up")
    return optax.warmup_cosine_decay_schedule(0.0 if warmup_steps else peak, peak, warmup_steps, total_steps, end)


SCHEDULES = {"constant": constant, "cosine": cosine}


def make_schedule(kind: str, **fields) -> optax.Schedule:
    """The schedule called kind ('constant' or 'cosine'); fields are its own keywords."""
    if kind not in SCHEDULES:
        raise ValueError(f"schedule={kind!r} is not known: choose one of {sorted(SCHEDULES)}")
    return SCHEDULES[kind](**fields)


def make_optimizer(
    schedule: optax.Schedule, *, b1: float, b2: float, eps: float, weight_decay: float, clip: float
) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter 2019) behind a clip of the gradient's global norm.

    Biases and norm scales (rank below 2) are not decayed.

    Args:
      schedule: learning rate by number of updates made; skipped steps do not advance it.
      clip: largest global norm of the gradient; `inf` for none.
    """
    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
        optax.add_decayed_weights(weight_decay, mask=is_matrix),
        scale_by_schedule(schedule),
    )


def is_matrix(params: Params) -> dict[str, bool]:
    """Which arrays weight decay pulls on: kernels and embeddings."""
    return jax.tree.map(lambda p: p.ndim >= 2, params)


class ScheduleState(NamedTuple):
    """The learning rate last used, kept so that metrics can tell it, and the number of updates made."""

    count: Int[Array, ""]
    learning_rate: Scalar


def scale_by_schedule(schedule: optax.Schedule) -> optax.GradientTransformation:
    """Multiplies by minus the learning rate and remembers which it was."""

    def init(params):
        return ScheduleState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32))

    def update(updates, state, params=None):
        rate = jnp.asarray(schedule(state.count), jnp.float32)
        return jax.tree.map(lambda u: -rate * u, updates), ScheduleState(state.count + 1, rate)

    return optax.GradientTransformation(init, update)


def learning_rate(opt_state: optax.OptState) -> Scalar:
    """The learning rate of the last update made by an optimiser of `make_optimizer`."""
    return optax.tree.get(opt_state, "learning_rate")
