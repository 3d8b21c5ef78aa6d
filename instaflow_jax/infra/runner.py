"""Runs one function over many rows: on all devices of this process, in equal batches, the last one padded and cut."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from instaflow_jax.infra.devices import with_sharding


class BatchedRunner:
    """Runs `function(fixed, *rows)` on all local devices, `per_device` rows on each.

    Every device runs the same program on rows of its own (`shard_map`), so a row's result does not depend on the
    number of devices.

    Attributes:
      rows: rows of one call, `per_device` × devices.
    """

    def __init__(self, function: Callable[..., PyTree], per_device: int, devices: Sequence[jax.Device] | None = None):
        """
        Args:
          function: pure; maps arrays [b, ...] to an array or a pytree of arrays [b, ...].
          per_device: rows per device and call.
          devices: default to those of this process.
        """
        devices = devices or jax.local_devices()
        mesh = jax.make_mesh((len(devices),), ("data",), devices=devices, axis_types=(AxisType.Auto,))
        self._replicated, self._split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
        self.rows = per_device * len(devices)

        def program(fixed, rows):
            return function(fixed, *rows)

        specs = (PartitionSpec(), PartitionSpec("data"))
        self._program = jax.jit(jax.shard_map(program, mesh=mesh, in_specs=specs, out_specs=specs[1], check_vma=False))

    def place(self, fixed: PyTree) -> PyTree:
        """Copies arrays that all rows share (weights, ...) to every device; pass the result as `fixed`."""
        return jax.device_put(fixed, self._replicated)

    def compile(self, fixed: PyTree, *rows: jax.ShapeDtypeStruct) -> float:
        """Compiles ahead of time for rows of these shapes [self.rows, ...] and dtypes; returns the seconds it took."""
        start = time.perf_counter()
        self._program = self.trace(fixed, *rows).lower().compile()
        return time.perf_counter() - start

    def trace(self, fixed: PyTree, *rows: jax.ShapeDtypeStruct) -> jax.stages.Traced:
        """The program of one call, from arrays or shapes of `fixed` and the shapes of its rows."""
        return self._program.trace(with_sharding(fixed, self._replicated), with_sharding(rows, self._split))

    def start(self, fixed: PyTree, *arrays: np.ndarray) -> PyTree:
        """Starts one call for up to `self.rows` rows and does not wait; the result has `self.rows` rows.

        Missing rows are filled by repeating the given ones.
        """
        full = tuple(np.resize(array, (self.rows, *array.shape[1:])) for array in arrays)
        return self._program(self.place(fixed), jax.device_put(full, self._split))

    def batches(self, count: int) -> Iterator[slice]:
        """Slices of `count` rows, one per call."""
        return (slice(start, min(start + self.rows, count)) for start in range(0, count, self.rows))

    def __call__(self, fixed: PyTree, *arrays: np.ndarray) -> Any:
        """The results for all rows, as numpy arrays [N, ...] for arrays [N, ...]."""
        fixed, count = self.place(fixed), len(arrays[0])
        outputs = [self.start(fixed, *(array[rows] for array in arrays)) for rows in self.batches(count)]
        return jax.tree.map(lambda *parts: np.concatenate([np.asarray(part) for part in parts])[:count], *outputs)
