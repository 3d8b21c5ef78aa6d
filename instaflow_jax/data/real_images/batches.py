"""Batches with real images, read from their latents: among the pairs, or beside them.

Both implement `train.batches.Batches`. Real images come in the order of `EndlessOrder`, so there may be fewer of them
than a batch takes; the position is the step alone.
"""

from typing import NamedTuple

import jax
import numpy as np

from instaflow_jax.data.noise import noise
from instaflow_jax.data.pairs.reader import PairBatches, Pairs, ReadAhead, Shards, batch_shapes, stack, with_dtype
from instaflow_jax.infra.epochs import EndlessOrder, local_rows

_FIRST = 2**63  # number of the first fresh noise, far from those of pairs of the same seed


class Share(NamedTuple):
    """Real images, and how many rows of a batch they take."""

    images: Shards
    rows: int


class MixedBatches(ReadAhead):
    """Batches of X0, X1 [b, h, w, c] and ids [b, L] in which some rows are real images and the others pairs.

    Eq. 5 on a real image with fresh noise is ordinary flow matching. So X0 of each such row is drawn from its seed and
    its position, a new one each time an image comes. The real images are spread evenly over the global batch, so that a
    batch does not depend on the number of processes.

    Args:
      pairs: None if every row is a real image.
      share: the real images.
      batch_size: global batch size; each process reads its own b rows of every batch.
      seed: seed of both orders and of the fresh noise.
      dtype: dtype of X0 and X1; on disk they are float16.

    Raises:
      ValueError: a batch that the processes cannot share.
    """

    def __init__(self, pairs: Pairs | None, share: Share, *, batch_size: int, seed: int, dtype=np.float32):
        self._pairs, self._images, self._counts = pairs, share.images, (batch_size - share.rows, share.rows)
        self._orders = [EndlessOrder(len(rows) if rows else 1, seed=seed) for rows in (pairs, share.images)]
        self._mine, self._batch_size = local_rows(batch_size), batch_size
        self._seed, self._dtype = seed, np.dtype(dtype)
        super().__init__(self._read)

    def _read(self, step: int) -> dict[str, np.ndarray]:
        real, paired = iter(self._read_real(step)), iter(self._read_paired(step))
        rows = [next(real if self._before(row + 1) > self._before(row) else paired) for row in self._mine]
        return with_dtype(stack(rows), self._dtype)

    def _before(self, row: int) -> int:
        """The number of real images before a row of the global batch."""
        return row * self._counts[1] // self._batch_size

    def _read_real(self, step: int) -> list[dict[str, np.ndarray]]:
        start = step * self._counts[1]
        positions = range(start + self._before(self._mine.start), start + self._before(self._mine.stop))
        shape = self._images.manifest["recipe"]["latent_shape"]
        rows = self._images.rows(self._orders[1][positions])
        return [
            {"X0": noise(self._seed, _FIRST + position, shape)} | row
            for position, row in zip(positions, rows, strict=True)
        ]

    def _read_paired(self, step: int) -> list[dict[str, np.ndarray]]:
        if self._pairs is None:
            return []
        first, last = (row - self._before(row) for row in (self._mine.start, self._mine.stop))
        start = step * self._counts[0]
        return self._pairs.rows(self._orders[0][range(start + first, start + last)])

    def spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        return batch_shapes(self._images.manifest["recipe"], len(self._mine), self._dtype)


class BatchesBesideImages(PairBatches):
    """`PairBatches` with as many real images beside the pairs: "real_X1" [b, h, w, c] and "real_ids" [b, L]."""

    def __init__(self, pairs: Pairs, images: Shards, *, batch_size: int, seed: int, dtype=np.float32):
        self._images, self._order = images, EndlessOrder(len(images), seed=seed)
        self._mine, self._batch_size = local_rows(batch_size), batch_size
        super().__init__(pairs, batch_size=batch_size, seed=seed, dtype=dtype)

    def _read(self, step: int) -> dict[str, np.ndarray]:
        start = step * self._batch_size
        rows = self._order[range(start + self._mine.start, start + self._mine.stop)]
        real = with_dtype(self._images.batch(rows), self._dtype)
        return super()._read(step) | {f"real_{name}": real[name] for name in ("X1", "ids")}

    def spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        return beside(super().spec())


def beside(shapes: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a batch of pairs, and of as many real images."""
    return shapes | {f"real_{name}": shapes[name] for name in ("X1", "ids")}
