"""Devices: one mesh ('data', 'fsdp'), one rule for state, one for batches, the same on one process or many.

The batch is split over both axes. Of the state, every large array is split over 'fsdp' along its largest axis
that divides, the rest is replicated; `fsdp=1` is plain data parallelism.
"""

import math
from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from instaflow_jax.arrays import Key

AXES = ("data", "fsdp")
# Below this many elements an array costs less memory replicated than time gathered (one bias, one norm).
LARGE = 2**14


def initialize(*, coordinator: str, processes: int, process: int) -> None:
    """Joins the processes of one run; must come before any other use of jax. Nothing to do for one process.

    Args:
      coordinator: 'host:port' of process 0; '' lets a cluster (Slurm, a TPU pod) tell it.
      processes: number of processes; 1 for a run without others, 0 where the cluster tells it.
      process: this process's number from 0; -1 where the cluster tells it.
    """
    if processes == 1:
        return
    told = {"coordinator_address": coordinator, "num_processes": processes, "process_id": process}
    unknown = {"coordinator_address": "", "num_processes": 0, "process_id": -1}
    jax.distributed.initialize(**{name: value for name, value in told.items() if value != unknown[name]})


def barrier(name: str) -> None:
    """Waits until every process of the run is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def make_mesh(*, fsdp: int) -> Mesh:
    """All devices as ('data', 'fsdp'), fsdp of them holding one copy of the state between them.

    Raises:
      ValueError: fsdp does not divide the number of devices.
    """
    count = jax.device_count()
    if fsdp < 1 or count % fsdp:
        raise ValueError(f"fsdp={fsdp} must divide the {count} devices of this run: choose a divisor, 1 for none")
    # Auto, because sharded convolutions fail under jax.make_mesh's default of Explicit.
    return jax.make_mesh((count // fsdp, fsdp), AXES, axis_types=(AxisType.Auto,) * 2)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """First axis over every device."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def array_sharding(shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """The one shape rule: largest divisible axis of a large array over 'fsdp', else replicated."""
    ways = mesh.shape["fsdp"]
    divisible = [axis for axis, size in enumerate(shape) if size % ways == 0]
    if ways == 1 or math.prod(shape) < LARGE or not divisible:
        return replicated(mesh)
    chosen = max(divisible, key=lambda axis: shape[axis])
    return NamedSharding(mesh, PartitionSpec(*("fsdp" if axis == chosen else None for axis in range(len(shape)))))


def state_sharding(tree: PyTree, mesh: Mesh) -> PyTree:
    """`array_sharding` for every leaf (arrays or ShapeDtypeStructs) of a state or of parameters."""
    return jax.tree.map(lambda leaf: array_sharding(leaf.shape, mesh), tree)


def abstract(tree: PyTree, mesh: Mesh) -> PyTree:
    """Shapes, dtypes and shardings of a state, without its bytes."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=array_sharding(leaf.shape, mesh)), tree
    )


def gathering(loss: Callable, mesh: Mesh) -> Callable:
    """`loss(params, ...)`, computed with every parameter whole on its device; gradients go back into shards.

    Left to itself, the partitioner splits convolutions along their sharded kernels and sends activations around.
    """
    if mesh.shape["fsdp"] == 1:
        return loss

    @jax.custom_vjp
    def gather(params: PyTree) -> PyTree:
        return jax.lax.with_sharding_constraint(params, replicated(mesh))

    def scatter(_: None, grads: PyTree) -> tuple[PyTree]:
        # Whole first: shards asked for at once reach back into the convolutions as shards of their activations.
        whole = jax.lax.with_sharding_constraint(grads, replicated(mesh))
        return (jax.lax.with_sharding_constraint(whole, state_sharding(grads, mesh)),)

    gather.defvjp(lambda params: (gather(params), None), scatter)
    return lambda params, *rest: loss(gather(params), *rest)


def create_sharded(create: Callable[..., PyTree], mesh: Mesh, *args) -> PyTree:
    """Runs create(*args) so that every array is born in its shards: nothing large ever exists whole."""
    shardings = state_sharding(jax.eval_shape(create, *args), mesh)
    return jax.jit(create, out_shardings=shardings)(*args)


def shard(tree: PyTree, mesh: Mesh) -> PyTree:
    """Puts host arrays (the same on every process) or device arrays into the shards of the shape rule."""
    return jax.tree.map(lambda leaf: _put(leaf, array_sharding(leaf.shape, mesh)), tree)


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """Puts host or device arrays whole on every device; leaves already on this mesh stay as they lie."""

    def place(leaf: Array | np.ndarray) -> Array:
        here = isinstance(leaf, jax.Array) and getattr(leaf.sharding, "mesh", None) == mesh
        return leaf if here else _put(leaf, replicated(mesh))

    return jax.tree.map(place, tree)


def _put(leaf: Array | np.ndarray, sharding: NamedSharding) -> Array:
    if isinstance(leaf, jax.Array):
        return jax.device_put(leaf, sharding)
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])


def to_host(tree: PyTree) -> PyTree:
    """Whole numpy arrays from device arrays of a mesh, however they are sharded; every process must call it."""
    return multihost_utils.process_allgather(tree, tiled=True)


def replicate_key(key: Key, mesh: Mesh) -> Key:
    """The run's key (made from the same seed on every process) on all devices."""
    data = replicate(np.asarray(jax.random.key_data(key)), mesh)
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))


def global_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, Array]:
    """One global batch from the rows that each process read. local [b, ...] to [b * processes, ...]."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


def abstract_batch(local: Mapping[str, jax.ShapeDtypeStruct], mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes that `global_batch` will give, for compiling before data starts."""
    grow, sharding = jax.process_count(), batch_sharding(mesh)

    def spec(rows: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows.shape[0] * grow, *rows.shape[1:]), rows.dtype, sharding=sharding)

    return {name: spec(rows) for name, rows in local.items()}


def check_batch_size(field: str, batch_size: int, mesh: Mesh, accumulate: int) -> None:
    """Refuses a global batch that the devices cannot share evenly.

    Raises:
      ValueError: batch_size is not a positive multiple of devices x accumulate.
    """
    unit = mesh.size * accumulate
    if batch_size < 1 or batch_size % unit:
        nearest = max(unit, round(batch_size / unit) * unit)
        raise ValueError(
            f"{field}={batch_size} must be a multiple of {unit} ({mesh.size} devices x accumulate={accumulate}), "
            f"so that every device gets the same number of rows in every micro-batch: try {field}={nearest}"
        )
