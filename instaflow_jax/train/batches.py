"""Where batches come from: the contract of a source, and the source for arrays in memory."""

from collections.abc import Mapping
from typing import Any, Protocol

import jax
import numpy as np


class Batches(Protocol):
    """An endless iterator that knows where it is.

    Every process has its own, gives its share of each global batch, and is at the same `state()` as the others.
    """

    def __next__(self) -> dict[str, np.ndarray]:
        """The next batch of this process, [local batch, ...] by name."""

    def spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of what `__next__` gives, known before any data is read."""

    def state(self) -> dict[str, Any]:
        """The position before the next batch; JSON."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes back, or on, to a position."""


class ArrayBatches:
    """Shuffled batches of arrays in memory; the last, incomplete batch of an epoch is left out.

    The order of epoch e is drawn from (seed, e) alone, so the whole position is one integer.

    Args:
      arrays: equally long along the first axis.
      batch_size: global; each process gets its share of the rows.

    Raises:
      ValueError: arrays of different lengths, fewer rows than a batch, or a batch the processes cannot share.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], *, batch_size: int, seed: int):
        lengths = {name: len(rows) for name, rows in arrays.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"arrays must be equally long along their first axis, not {lengths}: one row an example")
        self._rows = next(iter(lengths.values()))
        if not 1 <= batch_size <= self._rows:
            raise ValueError(f"batch_size={batch_size} must be 1 to the {self._rows} rows there are: lower it")
        if batch_size % jax.process_count():
            raise ValueError(f"batch_size={batch_size} must be a multiple of the {jax.process_count()} processes")
        self._arrays = arrays
        self._batch_size = batch_size
        self._local = batch_size // jax.process_count()
        self._seed = seed
        self._step = 0
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __next__(self) -> dict[str, np.ndarray]:
        epoch, batch = divmod(self._step, self._rows // self._batch_size)
        first = batch * self._batch_size + jax.process_index() * self._local
        rows = self._order_of(epoch)[first : first + self._local]
        self._step += 1
        return {name: array[rows] for name, array in self._arrays.items()}

    def _order_of(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self._seed, epoch]).permutation(self._rows)
        return self._order

    def spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {
            name: jax.ShapeDtypeStruct((self._local, *array.shape[1:]), array.dtype)
            for name, array in self._arrays.items()
        }

    def state(self) -> dict[str, int]:
        return {"step": self._step}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._step = state["step"]
