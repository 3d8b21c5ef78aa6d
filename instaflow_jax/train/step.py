"""One training step: gradient, clipping, AdamW and EMA, for any loss.

A loss is a function `(params, frozen, batch, key) → (scalar, metrics)`. All functions here are pure; `loop.py` compiles
them.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from instaflow_jax.arrays import Batch, Key, Params, Scalar
from instaflow_jax.infra import devices
from instaflow_jax.train import optim
from instaflow_jax.train.state import TrainState, ema_decay_at, packing, update_ema

Metrics = dict[str, Scalar]
Loss = Callable[[Params, PyTree, Batch, Key], tuple[Scalar, Metrics]]
Gradient = Callable[[Params, PyTree, Batch, Key], tuple[Scalar, Metrics, Params]]


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """The step, and what the loop computes shapes and cost from.

    Attributes:
      update: the step itself.
      gradients: the gradients that a step computes, from the same inputs: nearly all of its arithmetic.
      accumulate: the number of micro-batches per batch.
    """

    update: Callable[[TrainState, PyTree, Batch, Key], tuple[TrainState, Metrics]]
    gradients: Callable[[TrainState, PyTree, Batch, Key], PyTree]
    accumulate: int

    def __call__(self, state: TrainState, frozen: PyTree, batch: Batch, key: Key) -> tuple[TrainState, Metrics]:
        """Takes one step.

        Args:
          state: donated by the compiled step of `loop.trace_step`.
          frozen: arrays that the loss reads and nothing trains; an argument, so that they do not become constants.
          batch: arrays [global batch, ...].
          key: the run's key, the same at every step; the step folds `state.step` into it.

        Returns:
          The next state, and scalars: the metrics of the loss, and loss, grad_norm, update_norm, param_norm,
          learning_rate, skipped (1 if the gradient was not finite, so that only `step` changed).
        """
        return self.update(state, frozen, batch, key)


def make_train_step(
    loss: Loss,
    optimizer: optax.GradientTransformationExtraArgs,
    mesh: Mesh,
    *,
    ema_decay: float,
    accumulate: int,
    sharded: Sequence[str] = (),
    cast: devices.Cast = devices.keep,
) -> TrainStep:
    """Builds the step for one loss.

    Args:
      loss: a mean over the examples of the batch.
      optimizer: from `optim.make_optimizer`.
      mesh: of the state and of the batch.
      ema_decay: decay of the EMA after its ramp (`state.ema_decay_at`).
      accumulate: number of micro-batches whose gradients are averaged.
      sharded: entries of `frozen` that are split like the parameters.
      cast: of both to the types in which they are sent, see `devices.gathering`.

    Raises:
      ValueError: accumulate is below 1.
    """
    gradient = make_gradients(loss, accumulate, mesh, sharded, cast)

    def gradients(state: TrainState, frozen: PyTree, batch: Batch, key: Key) -> tuple[Scalar, Metrics, Params]:
        return gradient(state.params, frozen, batch, jax.random.fold_in(key, state.step))

    def update(state: TrainState, frozen: PyTree, batch: Batch, key: Key) -> tuple[TrainState, Metrics]:
        return advance(state, optimizer, ema_decay, *gradients(state, frozen, batch, key))

    return TrainStep(update, gradients, accumulate)


def advance(
    state: TrainState,
    optimizer: optax.GradientTransformationExtraArgs,
    ema_decay: float,
    value: Scalar,
    metrics: Metrics,
    grads: Params,
) -> tuple[TrainState, Metrics]:
    """The state after one gradient, or if that is not finite the old one at the next step; metrics of `TrainStep`."""
    pack, unpack = packing(state.params)
    old = pack((state.params, state.ema, state.opt_state))

    def apply_update():
        params, ema, opt_state = old
        updates, opt_state = optimizer.update(pack(grads), opt_state, params, norm=grad_norm)
        params = optax.apply_updates(params, updates)
        ema = update_ema(ema, params, ema_decay_at(state.step, ema_decay))
        return (params, ema, opt_state), optax.tree.norm(updates)

    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(value) & jnp.isfinite(grad_norm)
    # A cond, because for a select XLA would copy the parameters and both moments before it overwrites them.
    kept, update_norm = jax.lax.cond(finite, apply_update, lambda: (old, jnp.zeros_like(grad_norm)))
    params, ema, opt_state = unpack(kept)
    changed = {"step": state.step + 1, "params": params, "ema": ema, "opt_state": opt_state}
    return dataclasses.replace(state, **changed), metrics | {
        "loss": value,
        "grad_norm": grad_norm,
        "update_norm": update_norm,
        "param_norm": optax.tree.norm(kept[0]),
        "learning_rate": optim.learning_rate(opt_state),
        "skipped": 1 - finite.astype(jnp.float32),
    }


def make_gradients(loss: Loss, accumulate: int, mesh: Mesh, others: Sequence[str], cast: devices.Cast) -> Gradient:
    """The gradient of `loss` over `accumulate` micro-batches, by parameters that are split over the mesh.

    `others` and `cast` are those of `devices.gathering`.

    Raises:
      ValueError: accumulate is below 1.
    """
    if accumulate < 1:
        raise ValueError(f"accumulate={accumulate} must be 1 or more: use 1 for no micro-batches")
    gradient = make_gradient(loss)

    def mean(params, frozen, batch, key):
        if devices.gathers_once(params, [frozen[name] for name in others], mesh):
            total = devices.gathering(make_sum(gradient, accumulate), mesh, others, cast, loops=accumulate > 1)
        else:
            total = make_sum(devices.gathering(gradient, mesh, others, cast, loops=False), accumulate)
        return jax.tree.map(lambda a: a / accumulate, total(params, frozen, batch, key))

    return mean


def make_gradient(loss: Loss) -> Gradient:
    """A function that returns the loss, its metrics and its gradient with respect to params."""

    def gradient(params, frozen, batch, key):
        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params, frozen, batch, key)
        return value, metrics, grads

    return gradient


def make_sum(gradient: Gradient, count: int) -> Gradient:
    """The sum over `count` micro-batches, run one after the other, of what `gradient` returns."""

    def accumulated(params, frozen, batch, key):
        def add(total, part):
            micro, micro_key = part
            return jax.tree.map(jnp.add, total, gradient(params, frozen, micro, micro_key)), None

        parts = split_batch(batch, count), jax.random.split(key, count)
        first = jax.eval_shape(lambda parts: gradient(params, frozen, *jax.tree.map(lambda a: a[0], parts)), parts)
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), first)
        return jax.lax.scan(add, zeros, parts)[0]

    return gradient if count == 1 else accumulated


def split_batch(batch: Batch, count: int) -> Batch:
    """[B, ...] to [count, B / count, ...], where micro-batch i holds rows i, i + count, ...

    The batch is sharded in contiguous pieces, so every count-th row stays on its device; contiguous micro-batches would
    move between devices.

    Raises:
      ValueError: count does not divide B.
    """

    def split(name: str, array: Array) -> Array:
        size = array.shape[0]
        if size % count:
            raise ValueError(
                f"batch field {name!r} has {size} rows, which accumulate={count} does not divide: "
                "use another batch_size or accumulate"
            )
        return jnp.swapaxes(array.reshape(size // count, count, *array.shape[1:]), 0, 1)

    return {name: split(name, array) for name, array in batch.items()}
