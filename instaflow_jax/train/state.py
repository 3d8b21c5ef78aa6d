"""The training state: step, params, ema and opt_state."""

import dataclasses
from collections.abc import Mapping

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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TwoNetworkState(TrainState):
    """The state of a student and of a second network that is trained beside it.

    Attributes:
      fake: the second network's state, without a moving average. Its step counts its own updates.
    """

    fake: PyTree


def create(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step. `params` are copied, because the step donates the buffers of a state."""
    params, ema = jax.tree.map(jnp.array, params), jax.tree.map(jnp.array, params)
    return TrainState(jnp.zeros((), jnp.int32), params, ema, optimizer.init(params))


def create_two(
    params: Mapping[str, Params], optimizer: optax.GradientTransformation, fake_optimizer: optax.GradientTransformation
) -> TwoNetworkState:
    """The state before the first step of the networks "student" and "fake", see `create`."""
    student, fake = create(params["student"], optimizer), create(params["fake"], fake_optimizer)
    fields = {field.name: getattr(student, field.name) for field in dataclasses.fields(student)}
    return TwoNetworkState(**fields, fake=dataclasses.replace(fake, ema={}))


def ema_decay_at(step: Int[Array, ""], decay: float) -> Scalar:
    """The decay min(decay, (1 + n) / (10 + n)) at step n from 0: a ramp that forgets the first parameters quickly."""
    n = step.astype(jnp.float32)
    return jnp.minimum(decay, (1 + n) / (10 + n))


def update_ema(ema: Params, params: Params, decay: Scalar) -> Params:
    """decay · ema + (1 − decay) · params, written as a step towards params, which is exact where the two are equal.

    An empty `ema` stays empty, for a network that needs none.
    """
    return {name: old + (1 - decay) * (params[name] - old) for name, old in ema.items()}
