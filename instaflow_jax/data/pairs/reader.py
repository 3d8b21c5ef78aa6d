"""Reading pairs from the shards on disk: single pairs by number, or shuffled batches for training."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from instaflow_jax.data.noise import NAME, checksum, noise
from instaflow_jax.data.pairs import manifest as pairs_manifest
from instaflow_jax.data.pairs import store as pairs_store
from instaflow_jax.data.pairs.manifest import again
from instaflow_jax.infra import stores
from instaflow_jax.infra.epochs import ShuffledEpochs

Numbers = Sequence[int] | Int[np.ndarray, " B"]  # numbers of pairs
_PREFETCH = 4  # batches that are read ahead


class Shards:
    """A finished directory of examples (real images, or by `Pairs` pairs), read by number.

    Attributes:
      manifest: the directory's manifest; `manifest["recipe"]` says how they were made.

    Raises:
      FileNotFoundError: there is no manifest, or shards are missing or incomplete.
      ValueError: the manifest or a shard does not fit the recipe.
    """

    def __init__(self, directory: str | Path):
        from array_record.python.array_record_module import ArrayRecordReader
        from tensorflow_datasets.proto import tf_example_pb2

        self._open, self._parse = ArrayRecordReader, tf_example_pb2.Example.FromString
        self.manifest = pairs_manifest.read(Path(directory))
        self._recipe = self.manifest["recipe"]
        self._shape = tuple(self._recipe["latent_shape"])
        self._paths = self._find(Path(directory))
        self._readers: dict[int, Any] = {}

    def _find(self, directory: Path) -> list[Path]:
        shards = range(pairs_manifest.shard_count(self._recipe))
        paths = [pairs_store.shard_path(directory, self._recipe, shard) for shard in shards]
        absent = [
            path
            for shard, path in zip(shards, paths, strict=True)
            if pairs_store.shard_metadata(directory, self._recipe, shard) is None
        ]
        if absent:
            raise FileNotFoundError(
                f"{len(absent)} of {len(paths)} shards are missing or incomplete, the first "
                f"{absent[0]}: {again(self._recipe)} with the same config, which makes only these"
            )
        return paths

    def __len__(self) -> int:
        return self._recipe["count"]

    def __getitem__(self, number: int) -> dict[str, Any]:
        """One example: prompt (str), ids int32 [L], X1 and of a pair X0 float16 [h, w, c]."""
        fields = self._fields([number])[0]
        return {"prompt": fields["prompt"].bytes_list.value[0].decode()} | self._arrays(number, fields)

    def rows(self, numbers: Numbers) -> list[dict[str, np.ndarray]]:
        """The arrays of these examples: X1 and of pairs X0 float16 [h, w, c], ids int32 [L].

        Raises:
          ValueError: a shard is damaged, or regenerated noise differs from the noise the pair was made from.
        """
        numbers = [int(number) for number in numbers]
        return [self._arrays(number, row) for number, row in zip(numbers, self._fields(numbers), strict=True)]

    def batch(self, numbers: Numbers) -> dict[str, np.ndarray]:
        """The same arrays as a batch, [B, ...]. Raises as `rows`."""
        return stack(self.rows(numbers))

    def _fields(self, numbers: list[int]) -> list[Mapping[str, Any]]:
        """The parsed records; reads each shard once."""
        wanted: dict[int, list[int]] = {}
        for number in numbers:
            wanted.setdefault(number // self._recipe["shard_size"], []).append(number)
        found = {}
        for shard, members in wanted.items():
            found.update(zip(members, self._read(shard, members), strict=True))
        return [self._parse(found[number]).features.feature for number in numbers]

    def _read(self, shard: int, numbers: list[int]) -> list[bytes]:
        first = shard * self._recipe["shard_size"]
        if stores.fetch(self._paths[shard]):
            self._close_deleted()
        try:
            if shard not in self._readers:
                self._readers[shard] = self._open(str(self._paths[shard]), "readahead_buffer_size:0")
            return self._readers[shard].read([number - first for number in numbers])
        except RuntimeError as error:
            raise ValueError(
                f"{self._paths[shard]} is damaged ({error}): delete it and {again(self._recipe)} with the "
                "same config, which makes only this shard"
            ) from error

    def _close_deleted(self) -> None:
        """Closes the shards that made room in the cache, so that the system frees their space."""
        for shard in [shard for shard in self._readers if not self._paths[shard].is_file()]:
            self._readers.pop(shard).close()

    def _arrays(self, number: int, fields: Mapping[str, Any]) -> dict[str, np.ndarray]:
        return {"X1": self._latent(fields["X1"]), "ids": np.array(fields["ids"].int64_list.value, np.int32)}

    def _latent(self, field) -> np.ndarray:
        return np.frombuffer(field.bytes_list.value[0], "<f2").reshape(self._shape)


def stack(rows: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Rows of a batch as arrays [B, ...]."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


class Pairs(Shards):
    """A finished directory of pairs, read by number.

    Raises:
      FileNotFoundError, ValueError: as `Shards`, or its noise cannot be generated again.
    """

    def __init__(self, directory: str | Path):
        super().__init__(directory)
        if not self._recipe["store_noise"] and self._recipe["noise"] != NAME:
            raise ValueError(
                f"{directory} stores only the seeds of its noise, which {self._recipe['noise']!r} generates; this "
                f"version generates noise by {NAME!r}: read the pairs with the version that made them"
            )

    def _arrays(self, number: int, fields: Mapping[str, Any]) -> dict[str, np.ndarray]:
        X0 = self._latent(fields["X0"]) if self._recipe["store_noise"] else self._regenerate(number, fields)
        return {"X0": X0} | super()._arrays(number, fields)

    def _regenerate(self, number: int, fields: Mapping[str, Any]) -> np.ndarray:
        X0 = noise(self._recipe["seed"], number, self._shape)
        if checksum(X0) != fields["noise_crc"].int64_list.value[0]:
            raise ValueError(
                f"the noise of pair {number}, regenerated from seed {self._recipe['seed']}, is not the noise that the "
                "pair was made from: this machine's generator gives other numbers. Generate the pairs again with "
                "store_noise=True to train here"
            )
        return X0


class ReadAhead:
    """Batches by step, which a thread reads ahead. Implements `train.batches.Batches` but for `spec`.

    Args:
      read: step, counted from 0 → this process's rows of its batch.
    """

    def __init__(self, read: Callable[[int], dict[str, np.ndarray]]):
        self._read_step, self._step = read, 0
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="pairs")
        self._ahead: deque[Future] = deque()

    def __next__(self) -> dict[str, np.ndarray]:
        while len(self._ahead) < _PREFETCH:
            self._ahead.append(self._threads.submit(self._read_step, self._step + len(self._ahead)))
        batch = self._ahead[0].result()
        self._ahead.popleft()
        self._step += 1
        return batch

    def state(self) -> dict[str, int]:
        """The position before the next batch, as JSON."""
        return {"step": self._step}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Moves to a position returned by `state`."""
        for future in self._ahead:
            future.cancel()
        self._ahead.clear()
        self._step = state["step"]


class PairBatches(ReadAhead):
    """Endless shuffled batches for training: X0, X1 [b, h, w, c] and ids int32 [b, L] of this process.

    Implements `train.batches.Batches`; see `ShuffledEpochs` for the order. A thread reads ahead.

    Args:
      pairs: what to read.
      batch_size: global batch size; each process reads its own b rows of every batch.
      seed: seed of the order.
      dtype: dtype of X0 and X1; on disk they are float16.

    Raises:
      ValueError: fewer pairs than a batch, or a batch that the processes cannot share.
    """

    def __init__(self, pairs: Pairs, *, batch_size: int, seed: int, dtype=np.float32):
        self._epochs = ShuffledEpochs(len(pairs), batch_size=batch_size, seed=seed)
        self._pairs, self._dtype = pairs, np.dtype(dtype)
        super().__init__(self._read)

    def _read(self, step: int) -> dict[str, np.ndarray]:
        return with_dtype(self._pairs.batch(self._epochs[step]), self._dtype)

    def spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        return batch_shapes(self._pairs.manifest["recipe"], self._epochs.local, self._dtype)


def with_dtype(batch: Mapping[str, np.ndarray], dtype: np.dtype) -> dict[str, np.ndarray]:
    """The batch with latents of this dtype."""
    return {name: rows if name == "ids" else rows.astype(dtype, copy=False) for name, rows in batch.items()}


def batch_shapes(recipe: Mapping[str, Any], rows: int, dtype: np.dtype) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a batch of pairs of this recipe."""
    latent = jax.ShapeDtypeStruct((rows, *recipe["latent_shape"]), dtype)
    return {"X0": latent, "X1": latent, "ids": jax.ShapeDtypeStruct((rows, recipe["tokens"]), np.dtype(np.int32))}
