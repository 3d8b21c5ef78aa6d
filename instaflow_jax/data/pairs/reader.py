"""Reading pairs: any of them by number, or shuffled batches for training, straight from the shards on disk."""

from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from instaflow_jax.data.noise import NAME, checksum, noise
from instaflow_jax.data.pairs import manifest as pairs_manifest
from instaflow_jax.data.pairs import store as pairs_store

_AHEAD = 4  # batches read while earlier ones are used


class Pairs:
    """A finished directory of pairs, by number.

    Attributes:
      manifest: of the directory; `manifest["recipe"]` says by which teacher and solver.

    Raises:
      FileNotFoundError, ValueError: no manifest, a shard that is not there or not of this manifest; says what to do.
    """

    def __init__(self, directory: str | Path):
        from array_record.python.array_record_module import ArrayRecordReader
        from tensorflow_datasets.proto import tf_example_pb2

        self._open, self._parse = ArrayRecordReader, tf_example_pb2.Example.FromString
        self.manifest = pairs_manifest.read(Path(directory))
        self._recipe = self.manifest["recipe"]
        self._shape = tuple(self._recipe["latent_shape"])
        if not self._recipe["store_noise"] and self._recipe["noise"] != NAME:
            raise ValueError(
                f"{directory} keeps only the seeds of its noise, drawn by {self._recipe['noise']!r}; this "
                f"version draws by {NAME!r}: read it with the version that made it"
            )
        self._paths = self._find(Path(directory))
        self._readers: dict[int, Any] = {}

    def _find(self, directory: Path) -> list[Path]:
        shards = range(pairs_manifest.shard_count(self._recipe))
        paths = [pairs_store.shard_path(directory, self._recipe, shard) for shard in shards]
        absent = [
            path
            for shard, path in zip(shards, paths, strict=True)
            if pairs_store.finished(directory, self._recipe, shard) is None
        ]
        if absent:
            raise FileNotFoundError(
                f"{len(absent)} of {len(paths)} shards are missing or not whole, the first "
                f"{absent[0]}: start generate again with the same config, it makes just these"
            )
        return paths

    def __len__(self) -> int:
        return self._recipe["count"]

    def __getitem__(self, number: int) -> dict[str, Any]:
        """One pair: prompt (str), ids int32 [L], X0 and X1 float16 [h, w, c]."""
        fields = self._fields([number])[0]
        return {"prompt": fields["prompt"].bytes_list.value[0].decode()} | self._arrays(number, fields)

    def batch(self, numbers: Sequence[int]) -> dict[str, np.ndarray]:
        """X0, X1 float16 [B, h, w, c] and ids int32 [B, L] of these pairs.

        Raises:
          ValueError: a shard is damaged, or the noise drawn again is not the one the pair was made from.
        """
        rows = [self._arrays(number, row) for number, row in zip(numbers, self._fields(numbers), strict=True)]
        return {name: np.stack([row[name] for row in rows]) for name in ("X0", "X1", "ids")}

    def _fields(self, numbers: Sequence[int]) -> list[Mapping[str, Any]]:
        """The parsed records, each shard asked once."""
        wanted: dict[int, list[int]] = {}
        for number in numbers:
            wanted.setdefault(int(number) // self._recipe["shard_size"], []).append(int(number))
        found = {}
        for shard, members in wanted.items():
            found.update(zip(members, self._read(shard, members), strict=True))
        return [self._parse(found[int(number)]).features.feature for number in numbers]

    def _read(self, shard: int, numbers: list[int]) -> list[bytes]:
        first = shard * self._recipe["shard_size"]
        try:
            if shard not in self._readers:
                self._readers[shard] = self._open(str(self._paths[shard]), "readahead_buffer_size:0")
            return self._readers[shard].read([number - first for number in numbers])
        except RuntimeError as error:
            raise ValueError(
                f"{self._paths[shard]} is damaged ({error}): delete it and start generate again with the "
                "same config, it makes just this shard"
            ) from error

    def _arrays(self, number: int, fields: Mapping[str, Any]) -> dict[str, np.ndarray]:
        X0 = self._latent(fields["X0"]) if self._recipe["store_noise"] else self._drawn(number, fields)
        return {"X0": X0, "X1": self._latent(fields["X1"]), "ids": np.array(fields["ids"].int64_list.value, np.int32)}

    def _latent(self, field) -> np.ndarray:
        return np.frombuffer(field.bytes_list.value[0], "<f2").reshape(self._shape)

    def _drawn(self, number: int, fields: Mapping[str, Any]) -> np.ndarray:
        X0 = noise(self._recipe["seed"], number, self._shape)
        if checksum(X0) != fields["noise_crc"].int64_list.value[0]:
            raise ValueError(
                f"the noise of pair {number}, drawn again from seed {self._recipe['seed']}, is not the one it "
                "was made from: this machine's generator does not agree. Generate the pairs again with "
                "store_noise=True to train here"
            )
        return X0


class PairBatches:
    """Shuffled batches for training, for ever: X0, X1 [b, h, w, c] and ids int32 [b, L], b this process's share.

    Follows `train.batches.Batches`. The order of epoch e is drawn from (seed, e) alone, and the last, incomplete batch
    of an epoch is left out, so the whole position is one integer. Threads read ahead.

    Args:
      pairs: what to read.
      batch_size: global; each process reads its own rows of every batch.
      seed: of the order.
      dtype: of X0 and X1; on disk they are float16.

    Raises:
      ValueError: fewer pairs than a batch, or a batch the processes cannot share.
    """

    def __init__(self, pairs: Pairs, *, batch_size: int, seed: int, dtype=np.float32):
        if not 1 <= batch_size <= len(pairs):
            raise ValueError(
                f"batch_size={batch_size} must be 1 to the {len(pairs)} pairs there are: lower it, or generate more"
            )
        if batch_size % jax.process_count():
            raise ValueError(f"batch_size={batch_size} must be a multiple of the {jax.process_count()} processes")
        self._pairs, self._seed, self._dtype = pairs, seed, np.dtype(dtype)
        self._batch_size, self._local = batch_size, batch_size // jax.process_count()
        self._step = 0
        self._epoch, self._order = -1, np.empty(0, np.int64)
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="pairs")
        self._ahead: deque[Future] = deque()

    def __next__(self) -> dict[str, np.ndarray]:
        while len(self._ahead) < _AHEAD:
            numbers = self._numbers(self._step + len(self._ahead))
            self._ahead.append(self._threads.submit(self._read, numbers))
        batch = self._ahead[0].result()
        self._ahead.popleft()
        self._step += 1
        return batch

    def _read(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        rows = self._pairs.batch(numbers)
        return {name: rows[name].astype(self._dtype, copy=False) for name in ("X0", "X1")} | {"ids": rows["ids"]}

    def _numbers(self, step: int) -> np.ndarray:
        epoch, batch = divmod(step, len(self._pairs) // self._batch_size)
        if epoch != self._epoch:
            order = np.random.default_rng([self._seed, epoch]).permutation(len(self._pairs))
            self._epoch, self._order = epoch, order
        first = batch * self._batch_size + jax.process_index() * self._local
        return self._order[first : first + self._local]

    def spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        recipe = self._pairs.manifest["recipe"]
        latent = jax.ShapeDtypeStruct((self._local, *recipe["latent_shape"]), self._dtype)
        ids = jax.ShapeDtypeStruct((self._local, recipe["tokens"]), np.dtype(np.int32))
        return {"X0": latent, "X1": latent, "ids": ids}

    def state(self) -> dict[str, int]:
        """The position before the next batch; JSON."""
        return {"step": self._step}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes back, or on, to a position."""
        for future in self._ahead:
            future.cancel()
        self._ahead.clear()
        self._step = state["step"]
