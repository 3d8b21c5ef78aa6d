"""Batches: the protocol of a data source, and a source for arrays in memory."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from instaflow_jax.infra.epochs import ShuffledEpochs


@runtime_checkable
class Batches(Protocol):
    """An endless iterator with a position.

    Every process iterates over its share of each global batch; all processes have the same `state()`.
    """

    def __next__(self) -> dict[str, np.ndarray]:
        """The next batch of this process, [local batch, ...] by name."""

    def spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the arrays that `__next__` returns, known before any data is read."""

    def state(self) -> dict[str, Any]:
        """The position before the next batch; JSON."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Moves to a position."""


class ArrayBatches:
    """Shuffled batches of arrays in memory, in the order of `ShuffledEpochs`."""

    def __init__(self, arrays: Mapping[str, np.ndarray], *, batch_size: int, seed: int):
        """
        Args:
          arrays: of equal length along the first axis.
          batch_size: global.

        Raises:
          ValueError: arrays of different lengths, fewer rows than a batch, or a batch that the processes cannot share.
        """
        lengths = {name: len(array) for name, array in arrays.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(
                f"arrays must be equally long along their first axis, not {lengths}: use one row per example"
            )
        self._arrays, self._step = arrays, 0
        self._epochs = ShuffledEpochs(next(iter(lengths.values())), batch_size=batch_size, seed=seed)

    def __next__(self) -> dict[str, np.ndarray]:
        rows = self._epochs[self._step]
        self._step += 1
        return {name: array[rows] for name, array in self._arrays.items()}

    def spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        local = self._epochs.local
        return {name: jax.ShapeDtypeStruct((local, *a.shape[1:]), a.dtype) for name, a in self._arrays.items()}

    def state(self) -> dict[str, int]:
        return {"step": self._step}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._step = state["step"]
