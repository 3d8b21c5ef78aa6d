"""The compiled program of `generate` on every device of this process, and the pairs that it gives."""

import dataclasses
import time
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Float16, Int

from instaflow_jax.data.noise import noise
from instaflow_jax.stages.generate.job import Job, prompt, tokens


@dataclasses.dataclass(frozen=True)
class Made:
    """Some pairs in memory: numbers [B], ids [B, L], X0 and X1 [B, h, w, c]."""

    numbers: Sequence[int]
    ids: Int[np.ndarray, "B L"]
    X0: Float16[np.ndarray, "B h w c"]
    X1: Float16[np.ndarray, "B h w c"]


class Sampler:
    """The program, compiled once for all devices of this process; every call has `rows` rows, `config.batch` a device.

    Each device runs the same program on rows of its own (`shard_map`), not a share of one large program: a row's
    arithmetic does not depend on how many devices there are.
    """

    def __init__(self, job: Job):
        self._job = job
        devices = jax.local_devices()
        mesh = jax.make_mesh((len(devices),), ("data",), devices=devices, axis_types=(AxisType.Auto,))
        whole, split = PartitionSpec(), PartitionSpec("data")
        self.rows = job.config.batch * len(devices)
        self._split = NamedSharding(mesh, split)
        weights = {name: job.pipe.params[name] for name in ("unet", "text_encoder")}
        self._fixed = jax.device_put(
            (weights, job.pipe.tokenizer([job.recipe["negative"]])), NamedSharding(mesh, whole)
        )
        program = jax.shard_map(
            job.rows, mesh=mesh, in_specs=(whole, whole, split, split), out_specs=split, check_vma=False
        )
        began = time.perf_counter()
        self._program = jax.jit(program).lower(*self._fixed, *self._abstract()).compile()
        self.compile_seconds = time.perf_counter() - began

    def _abstract(self) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        recipe = self._job.recipe
        shapes = ((self.rows, recipe["tokens"]), np.int32), ((self.rows, *recipe["latent_shape"]), np.float16)
        return tuple(jax.ShapeDtypeStruct(*shape, sharding=self._split) for shape in shapes)

    def __call__(self, ids: Int[np.ndarray, "b L"], X0: Float16[np.ndarray, "b h w c"]) -> jax.Array:
        """X1, not waited for; rows that are short of a full call are filled up, and the filling is to be cut off."""
        full = [np.resize(array, (self.rows, *array.shape[1:])) for array in (ids, X0)]
        return self._program(*self._fixed, *jax.device_put(full, self._split))


def sample(job: Job, sampler: Sampler, numbers: range) -> Iterator[Made]:
    """The pairs of these numbers, a call at a time; the devices compute the next call while this one is written.

    Raises:
      ValueError: a pair is not finite.
    """
    ahead = None
    for start in range(0, len(numbers), sampler.rows):
        chunk = numbers[start : start + sampler.rows]
        ids, X0 = tokens(job, chunk), draw_noise(job, chunk)
        running = chunk, ids, X0, sampler(ids, X0)
        if ahead is not None:
            yield fetch(job, *ahead)
        ahead = running
    yield fetch(job, *ahead)


def fetch(job: Job, numbers: range, ids, X0, X1: jax.Array) -> Made:
    """Waits for a call and cuts off its filling."""
    X1 = np.asarray(X1)[: len(numbers)]
    bad = [i for i, row in zip(numbers, X1, strict=True) if not np.isfinite(row).all()]
    if bad:
        raise ValueError(
            f"pair {bad[0]} ({prompt(job, bad[0])!r}) is not finite in float16, as are {len(bad) - 1} more "
            f"of {len(numbers)}: lower alpha={job.recipe['alpha']:g}, or set dtype='float32'"
        )
    return Made(numbers, ids, X0, X1)


def draw_noise(job: Job, numbers: Sequence[int]) -> Float16[np.ndarray, "B h w c"]:
    return np.stack([noise(job.recipe["seed"], number, job.recipe["latent_shape"]) for number in numbers])
