"""The training state: step, params, ema and opt_state."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from instaflow_jax.arrays import Params, Scalar


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The complete training state, a pytree that is sharded, donated and saved together.

    A state may also hold ShapeDtypeStructs or shardings in place of arrays, hence the annotations.

    Attributes:
      step: steps taken, skipped ones included; equals the number of batches consumed.
      params: trained parameters, flat and named, fp32.
      ema: their exponential moving average; sampling uses it.
      opt_state: the optimizer's state.
    """

    step: PyTree
    params: PyTree
    ema: PyTree
    opt_state: PyTree


def create(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step. `params` are copied, because the step donates the buffers of a state."""
    params, ema = jax.tree.map(jnp.array, params), jax.tree.map(jnp.array, params)
    return TrainState(jnp.zeros((), jnp.int32), params, ema, optimizer.init(params))


def ema_decay_at(step: Int[Array, ""], decay: float) -> Scalar:
    """The decay min(decay, (1 + n) / (10 + n)) at step n from 0: a ramp that forgets the first parameters quickly."""
    n = step.astype(jnp.float32)
    return jnp.minimum(decay, (1 + n) / (10 + n))


def update_ema(ema: Params, params: Params, decay: Scalar) -> Params:
    """decay · ema + (1 − decay) · params, written as a step towards params, which is exact where the two are equal."""
    return jax.tree.map(lambda old, new: old + (1 - decay) * (new - old), ema, params)
