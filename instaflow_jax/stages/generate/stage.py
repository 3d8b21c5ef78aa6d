"""Stage `generate`: prompts → (X0, text, X1) by the teacher's ODE, on disk. It can be killed and restarted.

Process p of n makes the shards p, p + n, ...; processes share only the directory. The last one to finish completes it.
"""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from instaflow_jax import pipeline
from instaflow_jax.data import prompts
from instaflow_jax.data.pairs import manifest as pairs_manifest
from instaflow_jax.data.pairs import store as pairs_store
from instaflow_jax.data.pairs.manifest import Recipe
from instaflow_jax.data.pairs.reader import Pairs
from instaflow_jax.infra import devices, stores
from instaflow_jax.infra.progress import Progress
from instaflow_jax.stages.common.loading import PAIRS, read_solve_options, read_weight_options
from instaflow_jax.stages.common.ranges import check_ranges
from instaflow_jax.stages.generate import inspect as generate_inspect
from instaflow_jax.stages.generate import job as generate_job
from instaflow_jax.stages.generate.job import Generated, Job


def run(config: ConfigDict, workdir: str) -> None:
    """Fills `workdir`/pairs; with `config.inspect` only checks the pairs.

    Raises:
      ValueError, FileNotFoundError: a field of the config, a file of the teacher or of the pairs is wrong.
      OSError: the disk is full.
    """
    check_fields(config)
    directory = Path(workdir) / PAIRS
    if config.inspect:
        return generate_inspect.run(directory, config.preview)
    job = read_job(config)
    print(f"{config.prompts.source}: {prompts.describe(job.prompts.report)}", flush=True)
    pairs_manifest.begin(directory, job.recipe, job.about() | {"config": config.to_dict()})
    process, count = read_processes(config)
    mine = range(process, pairs_manifest.shard_count(job.recipe), count)
    left = [shard for shard in mine if pairs_store.shard_metadata(directory, job.recipe, shard) is None]
    print(f"{directory}: {len(mine) - len(left)} of {len(mine)} shards are finished", flush=True)
    if left:
        write_shards(job, directory, left, batch=config.batch, preview=config.preview)
    stores.sync()
    stores.refresh()  # shards of other processes
    if pairs_store.finish(directory, job.recipe):
        print(f"{directory}: all {job.recipe['count']} pairs are written; check them with --config.inspect=true")
    else:
        print(f"{directory}: this process has finished its shards; other processes have not yet")


def need_pairs(config: ConfigDict, directory: Path) -> Pairs:
    """Opens the pairs in `directory`/pairs, and first generates those that are missing.

    Complete pairs are used as they are; a line says which settings of `config` they were not made with.

    Raises:
      ValueError, FileNotFoundError, OSError: see `run` and `Pairs`.
    """
    folder = directory / PAIRS
    try:
        pairs = Pairs(folder)
    except FileNotFoundError as error:
        print(f"{error}\n→ generating pairs into {folder}", flush=True)
        run(config, str(directory))
        devices.barrier("pairs")
        pairs = Pairs(folder)
    recipe = pairs.manifest["recipe"]
    print(f"{len(pairs)} pairs by {recipe['solver']}, N={recipe['N']}, alpha={recipe['alpha']:g}", flush=True)
    if others := differing(config, recipe):
        print(f"warning: {folder} is used as it is, though config.pairs has {others}; delete it for others", flush=True)
    return pairs


def differing(config: ConfigDict, recipe: Recipe) -> str:
    """The settings of `config` that pairs of this recipe were not made with, such as "N=8 (not 25)"."""
    wanted = {name: config[name] for name in ("count", "seed", "N", "alpha", "negative", "solver")}
    ignored = {("count", 0), ("solver", "auto")}  # these leave the choice to the stage
    return ", ".join(
        f"{name}={value!r} (not {recipe[name]!r})"
        for name, value in wanted.items()
        if value != recipe[name] and (name, value) not in ignored
    )


def made_by(config: ConfigDict, source: str) -> ConfigDict:
    """A copy of a block `config.pairs`, whose pairs the model `source` makes."""
    pairs = config.copy_and_resolve_references().unlock()
    pairs.model = source
    return pairs.lock()


def has_pairs(directory: Path) -> bool:
    """Whether `directory`/pairs is complete. Raises ValueError if it does not fit its manifest."""
    try:
        return len(Pairs(directory / PAIRS)) > 0
    except FileNotFoundError:
        return False


def check_pairs(config: ConfigDict, directory: Path, pipe: pipeline.Pipeline | None = None) -> Recipe:
    """The recipe of the pairs that `need_pairs` opens or makes; checks all that making them needs. See `check`."""
    try:
        return Pairs(directory / PAIRS).manifest["recipe"]
    except FileNotFoundError:
        return check(config, str(directory), pipe)


def check(config: ConfigDict, workdir: str, pipe: pipeline.Pipeline | None = None) -> Recipe:
    """Every check of `run`, without making a pair or writing anything; returns the recipe of the pairs.

    Args:
      pipe: stands in for a teacher that is yet to be trained.

    Raises:
      ValueError, FileNotFoundError: see `run`.
    """
    check_fields(config)
    directory = Path(workdir) / PAIRS
    if config.inspect:
        return pairs_manifest.read(directory)["recipe"]
    recipe = read_job(config, pipe).recipe
    if pipe is None:
        pairs_manifest.check_same(directory, recipe)
    return recipe


def check_fields(config: ConfigDict) -> None:
    """Cross-field checks, before anything is loaded.

    Raises:
      ValueError: naming field, value and rule.
    """
    check_ranges(config)
    read_weight_options(config)
    read_solve_options(config)
    process, count = read_processes(config)
    if not 0 <= process < count:
        raise ValueError(f"config.process={process} must be one of 0 to {count - 1}, because config.processes={count}")


def read_processes(config: ConfigDict) -> tuple[int, int]:
    """This process's number and the number of processes, from the config or else from jax.distributed."""
    if config.processes == 0:
        return jax.process_index(), jax.process_count()
    return config.process, config.processes


def read_job(config: ConfigDict, pipe: pipeline.Pipeline | None = None) -> Job:
    """Reads the prompts and, unless `pipe` is given, the teacher that the config names.

    Raises:
      ValueError, FileNotFoundError: a field of the config, or a file, is wrong.
    """
    fields = config.prompts.to_dict()
    cleaning = prompts.Cleaning(**fields.pop("cleaning"))
    found = prompts.load(**fields, count=config.count, seed=config.seed, cleaning=cleaning)
    options = {name: config[name] for name in ("count", "seed", "shard_size", "store_noise")}
    weights, solving = read_weight_options(config), read_solve_options(config)
    return generate_job.load(config.model, weights, solving, found, **options, pipe=pipe)


def write_shards(job: Job, directory: Path, shards: list[int], *, batch: int, preview: int) -> None:
    """Writes these shards with `batch` pairs per device and call; with shard 0 also a preview of `preview` pairs."""
    runner, fixed, seconds = generate_job.compile_program(job, batch)
    recipe, shard_size, rows = job.recipe, job.recipe["shard_size"], runner.rows
    wasted = -shard_size % rows / shard_size
    note = f"; config.shard_size={shard_size} is not a multiple of that, which wastes {100 * wasted:.0f} %"
    print(
        f"compiled in {seconds:.1f} s: {rows} pairs per call on {len(jax.local_devices())} "
        f"devices{note if wasted > 0.05 else ''}",
        flush=True,
    )
    ranges = {shard: pairs_manifest.shard_range(recipe, shard) for shard in shards}
    progress = Progress(sum(map(len, ranges.values())), "pairs", file=sys.stdout)
    features, written = pairs_store.make_features(recipe), 0

    def records(shard: int) -> Iterator[bytes]:
        """The bytes of each pair, in the order of their numbers."""
        nonlocal written
        for pairs in generate_job.generate(job, runner, fixed, ranges[shard]):
            if pairs.numbers[0] == 0:
                draw_preview(job, pairs, preview, directory)
            for number, ids, X0, X1 in zip(pairs.numbers, pairs.ids, pairs.X0, pairs.X1, strict=True):
                fields: Mapping[str, Any] = {"ids": ids, "seed": number, "X0": X0, "X1": X1}
                record = pairs_store.serialize(features, recipe, prompt=job.prompt(number), **fields)
                written += len(record)
                yield record
            progress.advance(len(pairs.numbers), MB=f"{written / 1e6:.1f}")

    for shard in shards:
        pairs_store.write_shard(directory, recipe, shard, records(shard))
    progress.close()


def draw_preview(job: Job, pairs: Generated, count: int, directory: Path) -> None:
    """Draws the first `count` pairs as soon as they are made, so that a wrong setting shows in the first minute."""
    texts = [job.prompt(number) for number in pairs.numbers[:count]]
    vae = job.pipe.nets["vae"], job.pipe.params["vae"]
    generate_inspect.draw(*vae, texts, pairs.X0[:count], pairs.X1[:count], directory / generate_inspect.PREVIEW)
