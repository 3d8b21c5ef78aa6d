"""What every training stage does around the loop: mesh, optimiser, state in its shards, writer, checkpoints."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from instaflow_jax.arrays import Key, Params
from instaflow_jax.infra import devices, metrics
from instaflow_jax.infra.checkpoint import Checkpoints
from instaflow_jax.train import loop, optim
from instaflow_jax.train import state as train_state
from instaflow_jax.train import step as train_step
from instaflow_jax.train.batches import Batches
from instaflow_jax.train.state import TrainState
from instaflow_jax.train.step import Loss

Watch = Callable[[Params, Path], dict[str, float]]


def train(
    config: ConfigDict,
    directory: Path,
    *,
    start: Params | Callable[[Key], Params],
    loss: Loss,
    frozen: Mapping[str, Any],
    batches: Batches,
    watch: Watch,
) -> TrainState:
    """Trains in `directory`, resuming if it was broken off.

    Args:
      config: batch_size, accumulate, fsdp, seed, ema_decay, optim, schedule, loop, checkpoints, watch_every, tensorboard.
      start: the parameters to start from: those of a model (host arrays), or fresh ones from a key.
      frozen: what the loss reads and nobody trains.
      watch: (running mean, PNG file to write) → numbers to log; called every `config.eval_every` steps.

    Raises:
      ValueError, OSError, FloatingPointError: see `loop.train`.
    """
    mesh = devices.make_mesh(fsdp=config.fsdp)
    devices.check_batch_size("config.batch_size", config.batch_size, mesh, config.accumulate)
    optimizer = optim.make_optimizer(optim.make_schedule(**config.schedule), **config.optim)
    init_key, key = jax.random.split(jax.random.key(config.seed))
    if callable(start):
        state = devices.create_sharded(lambda k: train_state.create(start(k), optimizer), mesh, init_key)
    else:
        state = devices.create_sharded(lambda p: train_state.create(p, optimizer), mesh, devices.shard(start, mesh))
    step = train_step.make_train_step(
        devices.gathering(loss, mesh), optimizer, ema_decay=config.ema_decay, accumulate=config.accumulate
    )
    writer = metrics.make_writer(directory, tensorboard=config.tensorboard)
    checkpoints = Checkpoints(directory / "checkpoints", **config.checkpoints)
    try:
        return loop.train(
            step,
            state,
            frozen,
            batches,
            key=key,
            mesh=mesh,
            checkpoints=checkpoints,
            writer=writer,
            config=config.to_dict(),
            profile_dir=str(directory / "profile"),
            callbacks=[loop.Every(config.eval_every, make_watch(watch, directory, writer))],
            **config.loop,
        )
    finally:
        writer.close()
        checkpoints.close()


def make_watch(watch: Watch, directory: Path, writer: metrics.Writer) -> Callable[[int, TrainState], None]:
    """The callback that judges the running mean; every process takes part in gathering it, the first looks."""

    def run(step: int, state: TrainState) -> None:
        ema = devices.to_host(state.ema)
        if jax.process_index() == 0:
            numbers = watch(ema, directory / "grids" / f"{step:07d}.png")
            writer.write_scalars(step, numbers)
            print(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in numbers.items()), flush=True)

    return run
