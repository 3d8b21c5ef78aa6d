"""Stage `generate`: prompts → (X0, text, X1) by the teacher's ODE, on disk; may be killed and started again.

Process p of n makes shards p, p + n, ...; processes share nothing but the directory. Whoever finishes last completes it.
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import jax
from ml_collections import ConfigDict

from instaflow_jax.data import prompts
from instaflow_jax.data.pairs import manifest as pairs_manifest
from instaflow_jax.data.pairs import store as pairs_store
from instaflow_jax.infra import files
from instaflow_jax.infra.progress import clock_time
from instaflow_jax.stages.common.loading import read_solve_options, read_weight_options
from instaflow_jax.stages.generate import inspect as generate_inspect
from instaflow_jax.stages.generate import plan as generate_plan
from instaflow_jax.stages.generate.job import Job, about, prepare, prompt
from instaflow_jax.stages.generate.program import Made, Sampler, sample

DIRECTORY = "pairs"


def run(config: ConfigDict, workdir: str) -> None:
    """Fills `workdir`/pairs; with `config.plan` only says what that would cost, with `config.inspect` checks it.

    Raises:
      ValueError, FileNotFoundError: a field of the config, a file of the teacher or of the pairs is wrong.
      OSError: the disk is full.
    """
    check(config)
    directory = Path(workdir) / DIRECTORY
    if config.inspect:
        return generate_inspect.run(directory, config.preview)
    job = prepare(config)
    print(f"{config.prompts.source}: {prompts.describe(job.report)}", flush=True)
    if config.plan:
        return generate_plan.run(job)
    pairs_manifest.begin(directory, job.recipe, about(job))
    files.remove_stale(directory)
    process, count = processes(config)
    mine = range(process, pairs_manifest.shard_count(job.recipe), count)
    left = [shard for shard in mine if pairs_store.finished(directory, job.recipe, shard) is None]
    print(f"{directory}: {len(mine) - len(left)} of {len(mine)} shards are finished", flush=True)
    if left:
        make(job, directory, left)
    complete(job, directory)


def check(config: ConfigDict) -> None:
    """Cross-field checks, before anything is loaded.

    Raises:
      ValueError: naming field, value and rule.
    """
    read_weight_options(config)
    for name, least in (
        ("batch", 1),
        ("shard_size", 1),
        ("plan_devices", 1),
        ("preview", 1),
        ("count", 0),
        ("seed", 0),
    ):
        if config[name] < least:
            raise ValueError(f"config.{name}={config[name]} must be at least {least}")
    process, count = processes(config)
    if not 0 <= process < count:
        raise ValueError(f"config.process={process} must be one of 0 to {count - 1}, as config.processes={count}")
    read_solve_options(config)


def processes(config: ConfigDict) -> tuple[int, int]:
    """This process and how many there are: of the config, or those that jax.distributed knows of."""
    if config.processes == 0:
        return jax.process_index(), jax.process_count()
    return config.process, config.processes


def make(job: Job, directory: Path, shards: list[int]) -> None:
    """Writes these shards, and the preview with the first of all."""
    sampler = Sampler(job)
    wasted = -job.recipe["shard_size"] % sampler.rows / job.recipe["shard_size"]
    print(
        f"compiled in {sampler.compile_seconds:.1f} s: {sampler.rows} pairs a call on {len(jax.local_devices())} "
        f"devices"
        + (
            f"; config.shard_size={job.recipe['shard_size']} is no multiple of that, which wastes {100 * wasted:.0f} %"
            if wasted > 0.05
            else ""
        ),
        flush=True,
    )
    counts = [len(pairs_manifest.shard_range(job.recipe, shard)) for shard in shards]
    progress = Progress(sum(counts), sys.stdout)
    features = pairs_store.make_features(job.recipe)
    for shard in shards:
        numbers = pairs_manifest.shard_range(job.recipe, shard)
        rows = told(sample(job, sampler, numbers), progress)
        if shard == 0:
            rows = previewed(rows, job, directory / generate_inspect.PREVIEW)
        pairs_store.write_shard(directory, job.recipe, shard, records(job, features, rows, progress))
    progress.close()


def records(job: Job, features, chunks: Iterator[Made], progress: "Progress") -> Iterator[bytes]:
    """The bytes of each pair, in the order of their numbers."""
    for made in chunks:
        for number, ids, X0, X1 in zip(made.numbers, made.ids, made.X0, made.X1, strict=True):
            record = pairs_store.serialize(
                features, job.recipe, prompt=prompt(job, number), ids=ids, seed=number, X0=X0, X1=X1
            )
            progress.bytes += len(record)
            yield record


def told(chunks: Iterator[Made], progress: "Progress") -> Iterator[Made]:
    for made in chunks:
        yield made
        progress.update(len(made.numbers))


def previewed(chunks: Iterator[Made], job: Job, path: Path) -> Iterator[Made]:
    """Draws the first pairs when they are there, so that a wrong setting is seen in the first minute."""
    first = next(chunks)
    some = slice(job.config.preview)
    texts = [prompt(job, number) for number in first.numbers[some]]
    generate_inspect.draw(job.pipe.nets["vae"], job.pipe.params["vae"], texts, first.X0[some], first.X1[some], path)
    yield first
    yield from chunks


def complete(job: Job, directory: Path) -> None:
    """Ends the directory if nothing is missing, and says how it stands."""
    if pairs_store.finish(directory, job.recipe):
        print(f"{directory}: all {job.recipe['count']} pairs are there; --config.inspect=true checks them", flush=True)
    else:
        print(f"{directory}: the shards of this process are finished, others are not yet", flush=True)


class Progress:
    """Pairs/s, time left and bytes; one line rewritten on a terminal, else a new one every half minute."""

    def __init__(self, count: int, file: TextIO):
        self._count, self._file = count, file
        self._interval = 0.5 if file.isatty() else 30.0
        self._began = self._told = time.monotonic()
        self._done = 0
        self.bytes = 0

    def update(self, pairs: int) -> None:
        """Counts pairs that are done."""
        self._done += pairs
        now = time.monotonic()
        if now - self._told >= self._interval or self._done == self._count:
            self._told = now
            self._tell(max(now - self._began, 1e-9))

    def _tell(self, seconds: float) -> None:
        rate = self._done / seconds
        line = (
            f"{self._done}/{self._count} pairs ({100 * self._done / self._count:.0f} %) · {rate:.4g} pairs/s · "
            f"{self.bytes / 1e6:.1f} MB · {clock_time(seconds)} gone, "
            f"{clock_time((self._count - self._done) / rate)} left"
        )
        self._file.write(f"\r\x1b[K{line}" if self._file.isatty() else line + "\n")
        self._file.flush()

    def close(self) -> None:
        """Leaves a terminal's cursor below the line."""
        if self._file.isatty():
            self._file.write("\n")
