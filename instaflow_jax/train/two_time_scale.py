"""One training step of two networks: a student, and a fake score that follows it on a faster time scale (DMD2).

Each network has a loss of its own (`step.Loss`), which reads the other network's parameters from `frozen`.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import PyTree

from instaflow_jax.arrays import Batch, Key
from instaflow_jax.infra import devices
from instaflow_jax.train.state import TrainState, TwoNetworkState
from instaflow_jax.train.step import Loss, Metrics, TrainStep, advance, make_gradients


def make_two_time_scale_step(
    student_loss: Loss,
    fake_loss: Loss,
    optimizer: optax.GradientTransformationExtraArgs,
    fake_optimizer: optax.GradientTransformationExtraArgs,
    mesh: Mesh,
    *,
    ema_decay: float,
    accumulate: int,
    updates: int,
    first: int,
    unroll: bool,
    sharded: Sequence[str] = (),
    cast: devices.Cast = devices.keep,
) -> TrainStep:
    """Builds the step: `updates` updates of the fake score, each with its own noise, then one of the student.

    Args:
      student_loss: of the student's parameters; frozen["fake"] holds the fake score's.
      fake_loss: of the fake score's parameters; frozen["student"] holds the student's.
      optimizer, fake_optimizer: of each network.
      mesh: of the state and of the batch.
      ema_decay: of the student's moving average.
      accumulate: number of micro-batches of each update.
      updates: of the fake score in each step, 1 or more.
      first: the student waits for this many steps, so that the fake score knows it first.
      unroll: whether the fake score's updates are compiled one by one and not as a loop.
      sharded: entries of `frozen` that are split like the parameters.
      cast: of all of these to the types in which they are sent, see `devices.gathering`.

    Returns:
      A step over a `TwoNetworkState`. Its metrics are the student's, 0 while it waits, and the fake score's, averaged
      over its updates, as "fake_loss" and so on. "skipped" is 1 if any update was skipped.

    Raises:
      ValueError: accumulate is below 1.
    """
    student_gradient = make_gradients(student_loss, accumulate, mesh, ("fake", *sharded), cast)
    fake_gradient = make_gradients(fake_loss, accumulate, mesh, ("student", *sharded), cast)

    def update(state: TwoNetworkState, frozen: PyTree, batch: Batch, key: Key) -> tuple[TwoNetworkState, Metrics]:
        student_key, fake_key = jax.random.split(jax.random.fold_in(key, state.step))

        def update_fake(fake, key):
            others = {**frozen, "student": state.params}
            return advance(fake, fake_optimizer, 0.0, *fake_gradient(fake.params, others, batch, key))

        fake, fake_metrics = jax.lax.scan(update_fake, state.fake, jax.random.split(fake_key, updates), unroll=unroll)
        student = TrainState(state.step, state.params, state.ema, state.opt_state)

        # Outside of the cond, because XLA:CPU computes convolutions in a branch slowly.
        gradient = student_gradient(student.params, {**frozen, "fake": fake.params}, batch, student_key)

        def update_student():
            return advance(student, optimizer, ema_decay, *gradient)

        shapes = jax.eval_shape(update_student)[1]

        def wait():
            zeros = {name: jnp.zeros(shape.shape, shape.dtype) for name, shape in shapes.items()}
            return dataclasses.replace(student, step=student.step + 1), zeros

        student, metrics = jax.lax.cond(state.step >= first, update_student, wait)
        means = {f"fake_{name}": jnp.mean(values) for name, values in fake_metrics.items() if name != "skipped"}
        skipped = jnp.maximum(metrics["skipped"], jnp.max(fake_metrics["skipped"]))
        state = TwoNetworkState(student.step, student.params, student.ema, student.opt_state, fake)
        return state, metrics | means | {"skipped": skipped}

    def gradients(state: TwoNetworkState, frozen: PyTree, batch: Batch, key: Key) -> PyTree:
        others = {**frozen, "student": state.params, "fake": state.fake.params}
        keys = jax.random.split(key, updates)
        fake = jax.lax.map(lambda key: fake_gradient(state.fake.params, others, batch, key), keys)
        return fake, student_gradient(state.params, others, batch, key)

    return TrainStep(update, gradients, accumulate)
