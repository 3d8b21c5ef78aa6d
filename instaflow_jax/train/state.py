"""What training remembers between two steps: step, params, ema, opt_state, and nothing else."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from instaflow_jax.arrays import Params, Scalar


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The whole training state; a pytree that is sharded, donated and saved as one.

    Attributes:
      step: steps taken, skipped ones included; equals the number of batches consumed.
      params: trained parameters, flat and named, fp32.
      ema: their running mean, same names and shapes; what sampling reads.
      opt_state: the optimiser's own state.
    """

    step: Int[Array, ""]
    params: Params
    ema: Params
    opt_state: optax.OptState


def create(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """State before the first step. Parameters are copied, twice: the step takes over the buffers of a state."""
    params, ema = jax.tree.map(jnp.array, params), jax.tree.map(jnp.array, params)
    return TrainState(jnp.zeros((), jnp.int32), params, ema, optimizer.init(params))


def ema_decay_at(step: Int[Array, ""], decay: float) -> Scalar:
    """The usual ramp min(decay, (1 + n) / (10 + n)), so that early noise is forgotten; n counts from 0."""
    n = step.astype(jnp.float32)
    return jnp.minimum(decay, (1 + n) / (10 + n))


def update_ema(ema: Params, params: Params, decay: Scalar) -> Params:
    """decay * ema + (1 - decay) * params, written as one step towards params: exact where they agree."""
    return jax.tree.map(lambda old, new: old + (1 - decay) * (new - old), ema, params)
