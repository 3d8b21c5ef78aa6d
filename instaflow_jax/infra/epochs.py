"""Shuffled epochs over numbered rows, for one process or many; the position is one integer."""

import jax
import numpy as np
from jaxtyping import Int


def local_rows(batch_size: int) -> range:
    """The rows of a global batch that this process reads.

    Raises:
      ValueError: the processes cannot share the batch.
    """
    if batch_size % jax.process_count():
        raise ValueError(
            f"batch_size={batch_size} must be a multiple of {jax.process_count()}, the number of processes"
        )
    local = batch_size // jax.process_count()
    return range(jax.process_index() * local, (jax.process_index() + 1) * local)


class Shuffled:
    """The order of rows in each epoch e, which depends on (seed, e) alone."""

    def __init__(self, rows: int, *, seed: int):
        self._rows, self._seed = rows, seed
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __getitem__(self, epoch: int) -> Int[np.ndarray, " rows"]:
        if epoch != self._epoch:
            self._order = np.random.default_rng([self._seed, epoch]).permutation(self._rows)
            self._epoch = epoch
        return self._order


class EndlessOrder:
    """Rows by position in shuffled epochs that follow each other without a gap; epochs may be shorter than a batch."""

    def __init__(self, rows: int, *, seed: int):
        self._rows, self._epochs = rows, Shuffled(rows, seed=seed)

    def __getitem__(self, positions: range) -> list[int]:
        """The rows at these positions, counted from 0 over all epochs."""
        return [int(self._epochs[position // self._rows][position % self._rows]) for position in positions]


class ShuffledEpochs:
    """The rows that this process reads at each step.

    The order of epoch e depends on (seed, e) alone. The last, incomplete batch of an epoch is left out.

    Attributes:
      local: number of rows that this process reads per batch.
    """

    def __init__(self, rows: int, *, batch_size: int, seed: int):
        """
        Args:
          rows: number of rows in an epoch.
          batch_size: global; each process reads its share.

        Raises:
          ValueError: fewer rows than a batch, or a batch that the processes cannot share.
        """
        if not 1 <= batch_size <= rows:
            raise ValueError(
                f"batch_size={batch_size} must be from 1 to {rows}, the number of examples; use a smaller one"
            )
        self._mine = local_rows(batch_size)
        self._batches, self._batch_size = rows // batch_size, batch_size
        self.local = len(self._mine)
        self._epochs = Shuffled(rows, seed=seed)

    def __getitem__(self, step: int) -> Int[np.ndarray, " local"]:
        """The rows of this process at a step, counted from 0 over all epochs."""
        epoch, batch = divmod(step, self._batches)
        first = batch * self._batch_size + self._mine.start
        return self._epochs[epoch][first : first + self.local]
