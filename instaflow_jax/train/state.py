"""The training state: step, params, ema and opt_state."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from instaflow_jax.arrays import Params, Scalar
from instaflow_jax.infra import devices

_PACKED = "vectors"  # the name of what `packing` joins


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


def packing(params: Params) -> tuple[Callable[[PyTree], PyTree], Callable[[PyTree], PyTree]]:
    """Two inverse functions: one joins the vectors of each dictionary into one vector, the other splits it again.

    Most arrays of a network are vectors: biases, and the scales of norms. Updated one by one they are a third of the
    instructions of a step, and a run that is started again waits until all of these are traced and read.

    Args:
      params: names and shapes of the parameters, arrays or shapes.

    Returns:
      Functions of any tree whose dictionaries have these names, such as parameters or an optimizer's state.
    """
    sizes = {name: array.size for name, array in params.items() if array.ndim == 1}
    ends = list(itertools.accumulate(sizes.values()))

    def pack(arrays: Params) -> Params:
        others = {name: array for name, array in arrays.items() if name not in sizes}
        return others | {_PACKED: jnp.concatenate([arrays[name] for name in sizes])}

    def unpack(arrays: Params) -> Params:
        vectors = dict(zip(sizes, jnp.split(arrays[_PACKED], ends[:-1]), strict=True))
        return {name: vectors[name] if name in vectors else arrays[name] for name in params}

    def each(change: Callable[[Params], Params]) -> Callable[[PyTree], PyTree]:
        def is_named(node: PyTree) -> bool:
            return isinstance(node, dict) and node != {}

        return lambda tree: jax.tree.map(lambda node: change(node) if is_named(node) else node, tree, is_leaf=is_named)

    return (each(pack), each(unpack)) if len(sizes) > 1 else (devices.keep, devices.keep)


def ema_decay_at(step: Int[Array, ""], decay: float) -> Scalar:
    """The decay min(decay, (1 + n) / (10 + n)) at step n from 0: a ramp that forgets the first parameters quickly."""
    n = step.astype(jnp.float32)
    return jnp.minimum(decay, (1 + n) / (10 + n))


def update_ema(ema: Params, params: Params, decay: Scalar) -> Params:
    """decay · ema + (1 − decay) · params, written as a step towards params, which is exact where the two are equal.

    An empty `ema` stays empty, for a network that needs none.
    """
    return {name: old + (1 - decay) * (params[name] - old) for name, old in ema.items()}
