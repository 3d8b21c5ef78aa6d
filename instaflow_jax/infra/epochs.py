"""Shuffled epochs over numbered rows, for one process or many; the position is one integer."""

import jax
import numpy as np
from jaxtyping import Int


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
        if batch_size % jax.process_count():
            raise ValueError(
                f"batch_size={batch_size} must be a multiple of {jax.process_count()}, the number of processes"
            )
        self._rows, self._batch_size, self._seed = rows, batch_size, seed
        self.local = batch_size // jax.process_count()
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __getitem__(self, step: int) -> Int[np.ndarray, " local"]:
        """The rows of this process at a step, counted from 0 over all epochs."""
        epoch, batch = divmod(step, self._rows // self._batch_size)
        if epoch != self._epoch:
            self._order = np.random.default_rng([self._seed, epoch]).permutation(self._rows)
            self._epoch = epoch
        first = batch * self._batch_size + jax.process_index() * self.local
        return self._order[first : first + self.local]
