"""Around the training loop: the mesh, optimizer, state, metrics and checkpoints that every training stage sets up."""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh
from jaxtyping import PyTree
from ml_collections import ConfigDict

from instaflow_jax.arrays import Key, Params
from instaflow_jax.infra import devices, metrics
from instaflow_jax.infra.checkpoint import Checkpoints, check_place, complete_steps, load_config
from instaflow_jax.infra.messages import first_ten
from instaflow_jax.infra.stores import CHECKPOINTS
from instaflow_jax.stages.common.ranges import check_ranges
from instaflow_jax.train import loop, optim
from instaflow_jax.train import state as train_state
from instaflow_jax.train import step as train_step
from instaflow_jax.train.batches import Batches
from instaflow_jax.train.state import TrainState
from instaflow_jax.train.step import Loss, TrainStep

RESUME = ("auto", "force")
_FREE = "eval checkpoints remat eval_every tensorboard fsdp attention kernels verify resume check data_dir log_every"
_FREE += " save_every max_skipped profile_steps batch preview process processes inspect"
# Settings that change neither the weights nor the pairs they are trained on.
_MAY_DIFFER = re.compile(rf"^loop\.steps$|(^|\.)({_FREE.replace(' ', '|')})(\.|$)")
_BEFORE = {"penalty": "squared"}  # what held in runs of versions that lacked the field
Method = tuple[Callable[[PyTree], TrainState], TrainStep]
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
    verify: bool
    resume: str
    config: Mapping[str, Any]


def read_train_options(config: ConfigDict) -> TrainOptions:
    """The block of `configs.common.training`, after a check of every number of the config. Raises ValueError."""
    check_ranges(config)
    values = config.to_dict()
    if values["resume"] not in RESUME:
        raise ValueError(f"config.resume={values['resume']!r} is not one of {', '.join(RESUME)}")
    steps = tuple(config.loop.profile_steps)
    if len(steps) != 2 or (steps != (0, 0) and not 1 <= steps[0] <= steps[1]):
        raise ValueError(f"config.loop.profile_steps={steps} must be (first, last) with 1 <= first <= last, or (0, 0)")
    names = [field.name for field in dataclasses.fields(TrainOptions) if field.name != "config"]
    return TrainOptions(**{name: values[name] for name in names}, config=values)


def check_same_run(options: TrainOptions, directory: Path, chosen: Sequence[str] = ()) -> None:
    """Refuses to continue the run in `directory` with other settings, before anything is loaded or made.

    Fields that do not change the trained weights may differ, and a run may be made longer. So may fields that the
    version which started the run did not have.

    Args:
      chosen: fields that the stage itself sets, to a path that changes when the workdir is moved.

    Raises:
      ValueError: listing the fields that differ, unless config.resume is "force".
    """
    folder = directory / CHECKPOINTS
    check_place(folder)
    steps = complete_steps(folder)
    if not steps or options.resume == "force":
        return
    there, here = saved(load_config(folder, step=None)), flat(options.config)
    differ = [name for name in differing(there, here) if name not in chosen and not _MAY_DIFFER.search(name)]
    if options.loop["steps"] < steps[-1]:
        differ.append("loop.steps")
    if differ:
        shown = [f"{name}={here[name]!r}, there {there.get(name)!r}" for name in differ]
        raise ValueError(
            f"{directory} holds a run with other settings, at step {steps[-1]} ({first_ten(shown, '; ')}): use its "
            "settings, another --workdir, or --config.resume=force to go on with the new ones"
        )


def differing(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """The names of the fields that two `flat` configs both have, with different values."""
    return [name for name in here if name in there and here[name] != there[name]]


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Every field of a config by its dotted name, tuples as the lists that JSON makes of them."""
    return dict(_leaves(config))


def saved(config: Mapping[str, Any]) -> dict[str, Any]:
    """`flat` of a config that an older version may have saved, with what held there for fields that it lacked."""
    return _BEFORE | flat(config)


def _leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, list(value) if isinstance(value, tuple) else value


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
    cast: devices.Cast,
    sharded: Sequence[str] = (),
) -> TrainState:
    """Trains in `directory` and returns the last state; resumes from the newest checkpoint there.

    Args:
      init: initial parameters: host arrays, or a function that draws them from a key.
      frozen: inputs of the loss that are not trained.
      evaluate: called with the running mean every `options.eval_every` steps; see `Evaluate`.
      cast: of parameters to the types in which the network uses them.
      sharded: the entries of `frozen` that are sharded as parameters are.

    Raises:
      ValueError, OSError, FloatingPointError: see `loop.train`.
    """

    def make_method(mesh: Mesh) -> Method:
        optimizer, step = make_step(options, loss, mesh, cast, sharded)
        return functools.partial(train_state.create, optimizer=optimizer), step

    return train_by(make_method, options, directory, init=init, frozen=frozen, batches=batches, evaluate=evaluate)


def train_by(
    make_method: Callable[[Mesh], Method],
    options: TrainOptions,
    directory: Path,
    *,
    init: PyTree | Callable[[Key], PyTree],
    frozen: Mapping[str, Any],
    batches: Batches,
    evaluate: Evaluate,
) -> TrainState:
    """`train` by any method: how to create a state from initial parameters, and its step."""
    mesh = devices.make_mesh(fsdp=options.fsdp)
    devices.check_batch_size("config.batch_size", options.batch_size, mesh, options.accumulate)
    create, step = make_method(mesh)
    init_key, key = jax.random.split(jax.random.key(options.seed))
    begin, given = (lambda key: create(init(key)), init_key) if callable(init) else (create, init)
    writer = metrics.make_writer(directory, tensorboard=options.tensorboard)
    checkpoints = Checkpoints(directory / CHECKPOINTS, **options.checkpoints, verify=options.verify)
    try:
        return loop.train(
            step,
            lambda: devices.create_sharded(begin, mesh, given if callable(init) else devices.shard(init, mesh)),
            devices.abstract(jax.eval_shape(begin, given), mesh),
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


def make_step(
    options: TrainOptions, loss: Loss, mesh: Mesh, cast: devices.Cast, sharded: Sequence[str] = ()
) -> tuple[optax.GradientTransformation, TrainStep]:
    """The optimizer and the step that `train` runs."""
    optimizer = optim.make_optimizer(optim.make_schedule(**options.schedule), **options.optim)
    fields = {"ema_decay": options.ema_decay, "accumulate": options.accumulate, "sharded": sharded, "cast": cast}
    return optimizer, train_step.make_train_step(loss, optimizer, mesh, **fields)


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
