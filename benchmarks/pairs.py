"""Does reading keep up? Shuffled pairs from disk against the rate of the embedded reflow step.

    python -m benchmarks.pairs [--count=4096] [--model=openmoji]

Prints a Markdown table. The pairs have the embedded world's shapes and are written to a temporary directory. Before
each pass of a cold row, the system is asked to drop them from its page cache. The aim is a ratio of 10.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import tensorflow_datasets as tfds

from configs import reflow
from instaflow_jax import pipeline
from instaflow_jax.data.noise import NAME, noise
from instaflow_jax.data.pairs import manifest as pairs_manifest
from instaflow_jax.data.pairs import store as pairs_store
from instaflow_jax.data.pairs.reader import PairBatches, Pairs
from instaflow_jax.infra import devices
from instaflow_jax.train import losses, optim, state, step

BATCH = 64
SHARD = 128
PROMPT = "woman astronaut"
STEPS = 12


def write(directory: Path, pipe: pipeline.Pipeline, count: int, store_noise: bool) -> Path:
    """A directory like the one `generate` makes, with noise in place of the images."""
    recipe = {
        "teacher": {"unet": "none"},
        "latent_shape": list(pipe.latent_shape),
        "count": count,
        "shard_size": SHARD,
        "tokens": pipe.tokenizer.model_max_length,
        "seed": 0,
        "noise": NAME,
        "store_noise": store_noise,
    }
    pairs_manifest.begin(directory, recipe, {})
    for shard in range(pairs_manifest.shard_count(recipe)):
        pairs_store.write_shard(directory, recipe, shard, records(recipe, shard, pipe.tokenizer([PROMPT])[0]))
    pairs_store.finish(directory, recipe)
    return directory


def records(recipe: pairs_manifest.Recipe, shard: int, ids: np.ndarray) -> Iterator[bytes]:
    features, shape = pairs_store.make_features(recipe), tuple(recipe["latent_shape"])
    for i in pairs_manifest.shard_range(recipe, shard):
        X0, X1 = noise(0, i, shape), noise(1, i, shape)
        yield pairs_store.serialize(features, recipe, prompt=PROMPT, ids=ids, seed=i, X0=X0, X1=X1)


def forget(directory: Path) -> None:
    """Asks the system to drop the shards from its page cache."""
    for path in directory.glob("*array_record*"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def rate(rows: Callable[[], Iterator[int]], before: Callable[[], None]) -> float:
    """Pairs/s of a pass, the median of three."""
    found = []
    for _ in range(3):
        before()
        start = time.perf_counter()
        count = sum(rows())
        found.append(count / (time.perf_counter() - start))
    return sorted(found)[1]


def batches(directory: Path, count: int) -> Callable[[], Iterator[int]]:
    """One pass with the reader that training uses."""

    def rows():
        source = PairBatches(Pairs(directory), batch_size=BATCH, seed=0)
        for _ in range(count // BATCH):
            yield len(next(source)["X0"])

    return rows


def tfds_rows(directory: Path, count: int) -> Callable[[], Iterator[int]]:
    """One shuffled pass with TFDS' own reader, row by row."""

    def rows():
        source = tfds.builder_from_directory(directory).as_data_source("train")
        for i in np.random.default_rng(0).permutation(count):
            yield len(source[int(i)]["X0"]) > 0

    return rows


def step_rate(pipe: pipeline.Pipeline) -> float:
    """Pairs/s of the reflow step of configs/reflow.py, from arrays in memory."""
    config = reflow.get_config()
    optimizer = optim.make_optimizer(optim.make_schedule(**config.schedule), **config.optim)
    loss = losses.make_reflow_loss(
        pipe.nets["unet"],
        pipe.nets["text_encoder"],
        prompt_dropout=config.prompt_dropout,
        num_timesteps=1000,
        **config.loss,
    )
    mesh = devices.make_mesh(fsdp=1)
    train_step = step.make_train_step(loss, optimizer, mesh, ema_decay=config.ema_decay, accumulate=1)
    update = jax.jit(train_step.update, donate_argnums=0)
    frozen = {"text_encoder": pipe.params["text_encoder"], "null_ids": pipe.tokenizer([""])}
    X0 = np.stack([noise(0, i, pipe.latent_shape) for i in range(BATCH)]).astype(np.float32)
    batch = {"X0": X0, "X1": X0[::-1].copy(), "ids": np.repeat(pipe.tokenizer([PROMPT]), BATCH, 0)}
    now, seconds = state.create(pipe.params["unet"], optimizer), []
    for _ in range(STEPS):
        start = time.perf_counter()
        now, _ = jax.block_until_ready(update(now, frozen, batch, jax.random.key(0)))
        seconds.append(time.perf_counter() - start)
    return BATCH / float(np.median(seconds[1:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=4096, help="pairs")
    parser.add_argument("--model", default="openmoji", help="embedded name, or a directory in diffusers layout")
    options = parser.parse_args()
    pipe = pipeline.load(options.model, variant=None, attention="xla")
    with tempfile.TemporaryDirectory() as scratch:
        stored = write(Path(scratch) / "stored", pipe, options.count, True)
        seeds = write(Path(scratch) / "seeds", pipe, options.count, False)
        step_pairs = step_rate(pipe)
        print(
            f"| {os.cpu_count()} CPU cores, {options.count} pairs, batches of {BATCH} | pairs/s | ratio to the step |\n"
            "|---|---|---|"
        )
        print(f"| reflow step of the embedded UNet | {step_pairs:.0f} | 1 |", flush=True)
        for name, directory, reader, cold in (
            ("PairBatches, X0 stored, cold", stored, batches, True),
            ("PairBatches, X0 stored", stored, batches, False),
            ("PairBatches, X0 drawn again, cold", seeds, batches, True),
            ("PairBatches, X0 drawn again", seeds, batches, False),
            ("tfds.as_data_source, X0 stored", stored, tfds_rows, False),
        ):
            found = rate(reader(directory, options.count), (lambda d=directory: forget(d)) if cold else lambda: None)
            print(f"| {name} | {found:.0f} | {found / step_pairs:.0f} |", flush=True)


if __name__ == "__main__":
    main()
