"""Stage `progressive`: a teacher → flows of fewer and fewer steps, each from the one before (arXiv 2202.00512).

The first round also folds the teacher's guidance into one network (arXiv 2210.03142).
"""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from instaflow_jax import flow, pipeline, sampling, solvers, teacher
from instaflow_jax.arrays import Params
from instaflow_jax.models.net import Net
from instaflow_jax.stages.common import fit, flow_training, loading
from instaflow_jax.stages.common.ranges import check_ranges
from instaflow_jax.stages.generate.stage import check_pairs, has_pairs, need_pairs
from instaflow_jax.train import losses
from instaflow_jax.train.losses import Bind, Grid
from instaflow_jax.train.step import Loss
from instaflow_jax.weights.conventions import NUM_TIMESTEPS


class Round(NamedTuple):
    """One round.

    Attributes:
      config: of this round alone: `model` is its teacher, `N` the number of the student's steps.
      directory: where it trains.
      chosen: fields of `config` that this stage has set to a path of the workdir.
    """

    config: ConfigDict
    directory: Path
    chosen: tuple[str, ...]


def run(config: ConfigDict, workdir: str) -> None:
    """Trains a flow of N steps in `workdir`/progressive_N for each N of `config.rounds`.

    Every round starts from the flow of the round before, which is also its teacher; the first one from `config.model`.
    All learn from the data and prompts of `workdir`/pairs, which are generated first if they are missing. A flow that
    has been exported is used as it is.

    Raises:
      ValueError, FileNotFoundError: a field of the config, the teacher or the pairs are wrong.
      OSError, FloatingPointError: see `train.loop`.
    """
    left = unfinished(config, Path(workdir))
    for each in left:
        read_options(each)
    if not has_pairs(Path(workdir)):
        check(config, workdir)
    pairs = need_pairs(config.pairs, Path(workdir))
    for each in left:
        options = read_options(each)
        pipe = loading.load(each.config.model, options.weights)
        print(f"{each.directory}: a flow of N={each.config.N} steps from {each.config.model}", flush=True)
        loss, frozen = load_loss(each.config, options, pipe)
        flow_training.train_flow(options, each.directory, pipe, pairs, loss, frozen, source=each.config.model)


def check(config: ConfigDict, workdir: str) -> None:
    """Every check of `run` and of the stage that it would run first, without training or writing anything.

    Raises:
      ValueError, FileNotFoundError: see `run`.
    """
    recipe, student = check_pairs(config.pairs, Path(workdir)), None
    for each in unfinished(config, Path(workdir)):
        options = read_options(each)
        pipe = student or loading.load(each.config.model, options.weights)
        flow_training.check(options, pipe, recipe, *load_loss(each.config, options, pipe))
        student = flow_training.as_flow(pipe, pipe.params["unet"])


# ---------------------------------------------------------------- the rounds


def unfinished(config: ConfigDict, workdir: Path) -> list[Round]:
    """The rounds that are left to run, in order; the last one is always among them.

    Raises:
      ValueError: `config.rounds`, or a number of the config, is wrong.
    """
    check_ranges(config)
    N, steps = tuple(config.rounds.N), tuple(config.rounds.steps)
    if any(before != 2 * after for before, after in itertools.pairwise(N)):
        raise ValueError(f"config.rounds.N={N}: each number of steps must be half the one before it, as in (4, 2, 1)")
    if len(steps) != len(N):
        raise ValueError(f"config.rounds.steps={steps} must hold a number of training steps for each of the N={N}")
    last = len(N) - 1
    rounds = [configure(config, workdir, i) for i in range(len(N))]
    return [each for i, each in enumerate(rounds) if i == last or not loading.has_export(each.directory)]


def configure(config: ConfigDict, workdir: Path, i: int) -> Round:
    """Round i, from 0; its learning rate falls over its own training steps."""
    alone = config.copy_and_resolve_references().unlock()
    alone.N, alone.loop.steps = config.rounds.N[i], config.rounds.steps[i]
    if alone.schedule.name == "cosine":
        alone.schedule.total_steps = alone.loop.steps
    if i == 0:
        return Round(alone.lock(), workdir / folder(alone.N), ())
    alone.model, alone.alpha = str(workdir / folder(2 * alone.N) / loading.EXPORT), 1.0  # guidance is in the weights
    alone.update(loading.AS_EXPORTED)
    return Round(alone.lock(), workdir / folder(alone.N), ("model",))


def folder(N: int) -> str:
    """The folder of the workdir that the flow of N steps is trained in."""
    return f"progressive_{N}"


def read_options(each: Round) -> flow_training.FlowOptions:
    """Checks and unpacks the config before anything is loaded. Raises ValueError."""
    options = flow_training.read_flow_options(each.config)
    fit.check_same_run(options.train, each.directory, each.chosen)
    return options


# ---------------------------------------------------------------- the loss


def load_loss(
    config: ConfigDict, options: flow_training.FlowOptions, pipe: pipeline.Pipeline
) -> tuple[Loss, dict[str, Params]]:
    """The loss, and its teacher's weights in the type they are computed with. Raises ValueError as `run` does."""
    loss = make_loss(config, options, pipe.nets, flow_training.start_dynamics(pipe))
    return loss, {"teacher": pipe.nets["unet"].cast(pipe.params["unet"])}


def make_loss(
    config: ConfigDict, options: flow_training.FlowOptions, nets: Mapping[str, Net], dynamics: sampling.Dynamics
) -> Loss:
    """The loss of a round whose teacher has these dynamics; `config` is the round's own."""
    return losses.make_progressive_loss(
        nets["unet"].with_remat(options.remat["unet"]),
        nets["text_encoder"],
        make_bind(dynamics, config.alpha),
        make_grid(dynamics, config.N),
        prompt_dropout=options.prompt_dropout,
        num_timesteps=NUM_TIMESTEPS,
    )


def make_grid(dynamics: sampling.Dynamics, N: int) -> Grid:
    """The teacher's 2N steps, of equal length in flow time, so that `solvers.euler(N)` draws from the student."""
    t = solvers.flow_times(2 * N)
    if isinstance(dynamics, sampling.Flow):
        return Grid(t, flow.timestep(t[:-1], dynamics.num_timesteps))
    return Grid(t, teacher.equal_noise(dynamics, t[:-1]))


def make_bind(dynamics: sampling.Dynamics, alpha: float) -> Bind:
    """`bind(network, text, null)`: the velocity of a teacher with these dynamics and guidance `alpha`."""
    if isinstance(dynamics, sampling.Flow):
        return lambda *bound: lambda Z, t, tau: flow.guided(*bound, alpha)(Z, tau)
    return lambda *bound: teacher.make_velocity_at(flow.guided(*bound, alpha), dynamics)
