"""Around the training loop: the mesh, optimizer, state, metrics and checkpoints that every training stage sets up."""

import dataclasses
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

Evaluate = Callable[[Params, Path], dict[str, float]]  # (running mean, PNG file to write) → numbers to log


# ---------------------------------------------------------------- blocks of the config


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """How a network is trained; see `configs/common.py:training`.

    Attributes:
      optim, schedule, loop, checkpoints: keywords of `optim.make_optimizer`, `optim.make_schedule`, `loop.train` and
        `Checkpoints`.
      config: the stage's resolved config, which is saved in every checkpoint.
    """

    batch_size: int
    accumulate: int
    fsdp: int
    seed: int
    ema_decay: float
    optim: Mapping[str, Any]
    schedule: Mapping[str, Any]
    loop: Mapping[str, Any]
    checkpoints: Mapping[str, Any]
    eval_every: int
    tensorboard: bool
    config: Mapping[str, Any]


def read_train_options(config: ConfigDict) -> TrainOptions:
    """The block of `configs.common.training`. Raises ValueError if eval_every is below 1."""
    values = config.to_dict()
    if values["eval_every"] < 1:
        raise ValueError(f"config.eval_every={values['eval_every']} must be at least 1 step")
    names = [field.name for field in dataclasses.fields(TrainOptions) if field.name != "config"]
    return TrainOptions(**{name: values[name] for name in names}, config=values)


@dataclasses.dataclass(frozen=True)
class EvalOptions:
    """The grid of samples that each evaluation draws: `seeds` images per prompt, for one N or for several."""

    prompts: tuple[str, ...]
    seeds: int
    N: int | tuple[int, ...]
    alpha: float


def read_eval_options(config: ConfigDict) -> EvalOptions:
    """The block `config.eval`."""
    return EvalOptions(**config.to_dict())


# ---------------------------------------------------------------- training


def check(options: TrainOptions) -> None:
    """Every check of `train` that needs neither weights nor data. Raises ValueError."""
    mesh = devices.make_mesh(fsdp=options.fsdp)
    devices.check_batch_size("config.batch_size", options.batch_size, mesh, options.accumulate)
    optim.make_optimizer(optim.make_schedule(**options.schedule), **options.optim)


def train(
    options: TrainOptions,
    directory: Path,
    *,
    init: Params | Callable[[Key], Params],
    loss: Loss,
    frozen: Mapping[str, Any],
    batches: Batches,
    evaluate: Evaluate,
) -> TrainState:
    """Trains in `directory` and returns the last state; resumes from the newest checkpoint there.

    Args:
      init: initial parameters: host arrays, or a function that draws them from a key.
      frozen: inputs of the loss that are not trained.
      evaluate: called with the running mean every `options.eval_every` steps; see `Evaluate`.

    Raises:
      ValueError, OSError, FloatingPointError: see `loop.train`.
    """
    mesh = devices.make_mesh(fsdp=options.fsdp)
    devices.check_batch_size("config.batch_size", options.batch_size, mesh, options.accumulate)
    optimizer = optim.make_optimizer(optim.make_schedule(**options.schedule), **options.optim)
    init_key, key = jax.random.split(jax.random.key(options.seed))
    if callable(init):
        state = devices.create_sharded(lambda k: train_state.create(init(k), optimizer), mesh, init_key)
    else:
        state = devices.create_sharded(lambda p: train_state.create(p, optimizer), mesh, devices.shard(init, mesh))
    step = train_step.make_train_step(
        devices.gathering(loss, mesh), optimizer, ema_decay=options.ema_decay, accumulate=options.accumulate
    )
    writer = metrics.make_writer(directory, tensorboard=options.tensorboard)
    checkpoints = Checkpoints(directory / "checkpoints", **options.checkpoints)
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
            config=options.config,
            profile_dir=str(directory / "profile"),
            callbacks=[loop.Callback(options.eval_every, make_eval_callback(evaluate, directory, writer))],
            **options.loop,
        )
    finally:
        writer.close()
        checkpoints.close()


def make_eval_callback(
    evaluate: Evaluate, directory: Path, writer: metrics.Writer
) -> Callable[[int, TrainState], None]:
    """Evaluates the running mean; every process takes part in gathering it, the first one evaluates."""

    def run(step: int, state: TrainState) -> None:
        ema = devices.to_host(state.ema)
        if jax.process_index() == 0:
            numbers = evaluate(ema, directory / "grids" / f"{step:07d}.png")
            writer.write_scalars(step, numbers)
            print(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in numbers.items()), flush=True)

    return run


def export_ema(state: TrainState, export: Callable[[Params], None]) -> None:
    """Gathers the running mean on every process and calls `export` with it on the first; the others wait."""
    ema = devices.to_host(state.ema)
    if jax.process_index() == 0:
        export(ema)
    devices.barrier("export")
