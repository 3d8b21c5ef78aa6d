"""Devices: one mesh ('data', 'fsdp'), one sharding rule for state and one for batches, for any number of processes.

Batches are split over both axes. Large arrays of the state are split over 'fsdp' along their largest divisible axis;
the others are replicated. `fsdp=1` is plain data parallelism.
"""

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from glob import glob

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from instaflow_jax.arrays import AnyArray, Key
from instaflow_jax.infra import cost, files, stores

AXES = ("data", "fsdp")
AnyMesh = Mesh | AbstractMesh
Cast = Callable[[PyTree], PyTree]  # parameters → the same in other types
# Smaller arrays (a bias, a norm's scale) are replicated: gathering them would cost more time than it saves memory.
MIN_SHARDED_SIZE = 2**14


def initialize(*, coordinator: str, processes: int, process: int) -> None:
    """Joins the processes of one run; must be called before any other use of jax.

    Args:
      coordinator: 'host:port' of process 0; '' to get it from the cluster (Slurm, a TPU pod).
      processes: number of processes; 0 to get it from the cluster.
      process: index of this process; -1 to get it from the cluster.
    """
    if not jax.config.jax_platforms and has_only_the_tpus_compiler():
        jax.config.update("jax_platforms", "cpu")
    if processes == 1:
        return
    jax.distributed.initialize(
        coordinator_address=coordinator or None,
        num_processes=processes or None,
        process_id=None if process == -1 else process,
    )


def keep_compiled_programs() -> None:
    """Keeps compiled programs in the user's cache folder for the next process, unless JAX has a folder already."""
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(files.user_cache() / "compiled"))


def has_only_the_tpus_compiler() -> bool:
    """Whether libtpu is there for `plan` alone; without a TPU it would print warnings at every start."""
    packages = {name: importlib.util.find_spec(name) for name in ("libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin")}
    return [name for name in packages if packages[name]] == ["libtpu"] and not glob("/dev/accel*") + glob("/dev/vfio/*")


def barrier(name: str) -> None:
    """Waits until every process of the run has reached this call; then each sees what the others wrote before it."""
    stores.sync()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
        stores.refresh()


def make_mesh(*, fsdp: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The devices as a mesh ('data', 'fsdp').

    Args:
      fsdp: number of devices that share one copy of the state; 1 replicates it.
      devices: default to all devices of the run; a described topology serves for ahead-of-time compilation.

    Raises:
      ValueError: fsdp does not divide the number of devices.
    """
    count = jax.device_count() if devices is None else len(devices)
    if fsdp < 1 or count % fsdp:
        raise ValueError(f"fsdp={fsdp} must divide the {count} devices of this run: use a divisor, or 1 to replicate")
    # Auto, because sharded convolutions fail under jax.make_mesh's default of Explicit.
    return jax.make_mesh((count // fsdp, fsdp), AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis split over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def replicated(mesh: AnyMesh) -> NamedSharding:
    """A full copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def array_sharding(shape: tuple[int, ...], mesh: AnyMesh) -> NamedSharding:
    """The sharding rule for state: a large array is split over 'fsdp' along its largest divisible axis."""
    ways = mesh.shape["fsdp"]
    divisible = [axis for axis, size in enumerate(shape) if size % ways == 0]
    if ways == 1 or math.prod(shape) < MIN_SHARDED_SIZE or not divisible:
        return replicated(mesh)
    chosen = max(divisible, key=lambda axis: shape[axis])
    return NamedSharding(mesh, PartitionSpec(*("fsdp" if axis == chosen else None for axis in range(len(shape)))))


def state_sharding(tree: PyTree, mesh: Mesh) -> PyTree:
    """`array_sharding` for every leaf (arrays or ShapeDtypeStructs) of a state or of parameters."""
    return jax.tree.map(lambda leaf: array_sharding(leaf.shape, mesh), tree)


def with_sharding(tree: PyTree, sharding: NamedSharding) -> PyTree:
    """Shapes and dtypes of arrays or shapes, all with this sharding: to compile before there are values."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def abstract(tree: PyTree, mesh: Mesh) -> PyTree:
    """Shapes, dtypes and shardings of a state, without its values."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=array_sharding(leaf.shape, mesh)), tree
    )


def platform(mesh: Mesh) -> str:
    """ "cpu", "gpu" or "tpu": of the devices of a mesh, which are of one kind."""
    return mesh.devices.flat[0].platform


def gathers_once(params: PyTree, others: PyTree, mesh: Mesh) -> bool:
    """Whether a step gathers weights and sums gradients once, outside of its loop over micro-batches.

    That sends least, but each device then holds them whole. Where they take more than a quarter of its memory, as those
    of SD's U-Net do on 16 GiB, each micro-batch gathers and scatters instead.

    Args:
      params: what is trained, arrays or shapes; counted in float32, and once more for the gradients.
      others: what is split like the parameters and not trained.
    """
    found = cost.peak(mesh.devices.flat[0].device_kind)
    whole = jax.tree.leaves((params, params, others))
    return found is None or 4 * sum(math.prod(leaf.shape) for leaf in whole) <= found.memory / 4


def keep(params: PyTree) -> PyTree:
    """The `Cast` that changes nothing."""
    return params


def gathering(gradient: Callable, mesh: Mesh, others: Sequence[str], cast: Cast, *, loops: bool) -> Callable:
    """`gradient(params, frozen, batch, key)` that gathers parameters before it computes and scatters what it found.

    Without this the partitioner splits convolutions along their sharded kernels and sends activations between devices.

    Args:
      gradient: returns (value, metrics, gradients), the latter of the parameters' types.
      others: entries of `frozen` that are split like `params`.
      cast: of parameters to the types in which layers use them (`Net.cast`). They are sent in these types, without a
        change of the result. So are gradients: those of one micro-batch have these types anyway, a sum is rounded.
        Not used for TPUs, whose compiler does so by itself, and keeps whole float32 weights if it is told to.
      loops: whether `gradient` loops over micro-batches.
    """
    if mesh.shape["fsdp"] == 1:
        return gradient
    tpu = platform(mesh) == "tpu"
    cast = keep if tpu else cast

    def whole(tree: PyTree) -> PyTree:
        return jax.lax.with_sharding_constraint(tree, replicated(mesh))

    def gather(tree: PyTree) -> PyTree:
        sent = whole(cast(tree))
        # On GPUs XLA casts after it gathers, and gathers in each round of a loop, if no barrier forbids it.
        return like(jax.tree.map(jax.lax.optimization_barrier, sent) if loops or not tpu else sent, tree)

    def like(tree: PyTree, other: PyTree) -> PyTree:
        return jax.tree.map(lambda a, b: a.astype(b.dtype), tree, other)

    def gathered(params, frozen, batch, key):
        frozen = {**frozen, **{name: gather(frozen[name]) for name in others}}
        value, metrics, grads = gradient(gather(params), frozen, batch, key)
        # Replicate first: a sharded gradient would make the partitioner shard the convolutions' activations as well.
        # Cast first: on GPUs XLA sums in these types anyway, but makes a reduce-scatter only of a sum that is not cast.
        scattered = jax.lax.with_sharding_constraint(whole(cast(grads)), state_sharding(grads, mesh))
        return value, metrics, like(scattered, grads)

    return gathered


def create_sharded(create: Callable[..., PyTree], mesh: Mesh, *args) -> PyTree:
    """The result of create(*args), computed in shards: no large array ever exists unsharded."""
    shardings = state_sharding(jax.eval_shape(create, *args), mesh)
    return jax.jit(create, out_shardings=shardings)(*args)


def shard(tree: PyTree, mesh: Mesh) -> PyTree:
    """Splits host arrays (the same on every process) or device arrays by `array_sharding`."""
    return jax.tree.map(lambda leaf: _put(leaf, array_sharding(leaf.shape, mesh)), tree)


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """Copies host or device arrays to every device; leaves already on this mesh keep their sharding."""

    def place(leaf: AnyArray) -> Array:
        on_mesh = isinstance(leaf, jax.Array) and getattr(leaf.sharding, "mesh", None) == mesh
        return leaf if on_mesh else _put(leaf, replicated(mesh))

    return jax.tree.map(place, tree)


def _put(leaf: AnyArray, sharding: NamedSharding) -> Array:
    if isinstance(leaf, jax.Array):
        return jax.device_put(leaf, sharding)
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])


def to_host(tree: PyTree) -> PyTree:
    """Full numpy arrays from sharded device arrays; every process must call it."""
    return multihost_utils.process_allgather(tree, tiled=True)


def replicate_key(key: Key, mesh: Mesh) -> Key:
    """The run's key (the same on every process) copied to all devices."""
    data = replicate(np.asarray(jax.random.key_data(key)), mesh)
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))


def global_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, Array]:
    """One global batch [b * processes, ...] from the rows [b, ...] that each process read."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


def abstract_batch(local: Mapping[str, jax.ShapeDtypeStruct], mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes that `global_batch` returns for these local shapes, to compile before any data is read."""
    processes, sharding = jax.process_count(), batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct((a.shape[0] * processes, *a.shape[1:]), a.dtype, sharding=sharding)
        for name, a in local.items()
    }


def check_batch_size(field: str, batch_size: int, mesh: AnyMesh, accumulate: int) -> None:
    """Checks that the devices can share a global batch evenly.

    Raises:
      ValueError: accumulate is below 1, or batch_size is not a positive multiple of devices × accumulate.
    """
    if accumulate < 1:
        raise ValueError(f"accumulate={accumulate} must be at least 1; use 1 for no micro-batches")
    unit = mesh.size * accumulate
    if batch_size < 1 or batch_size % unit:
        nearest = max(unit, round(batch_size / unit) * unit)
        raise ValueError(
            f"{field}={batch_size} must be a multiple of {unit} ({mesh.size} devices x accumulate={accumulate}), "
            f"so that every device gets the same number of rows in every micro-batch: use {field}={nearest}"
        )
