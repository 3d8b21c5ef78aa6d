"""The training loop, read from top to bottom; pretraining, reflow and distillation all run in it."""

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from instaflow_jax.arrays import Key
from instaflow_jax.infra import devices
from instaflow_jax.infra.checkpoint import Checkpoints
from instaflow_jax.infra.cost import describe, rates, step_flops
from instaflow_jax.infra.metrics import Writer
from instaflow_jax.infra.preemption import Preempted, Preemption
from instaflow_jax.infra.progress import Progress
from instaflow_jax.train.batches import Batches
from instaflow_jax.train.state import TrainState
from instaflow_jax.train.step import Metrics, TrainStep

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Every:
    """Something to do after every n-th step and after the last, such as a grid of samples."""

    steps: int
    run: Callable[[int, TrainState], None]


def train(
    step: TrainStep,
    state: TrainState,
    frozen: PyTree,
    batches: Batches,
    *,
    key: Key,
    mesh: Mesh,
    checkpoints: Checkpoints,
    writer: Writer,
    config: Mapping[str, Any],
    callbacks: Sequence[Every],
    steps: int,
    log_every: int,
    save_every: int,
    max_skipped: int,
    profile_steps: tuple[int, int],
    profile_dir: str,
) -> TrainState:
    """Trains until `steps`, from the newest checkpoint if there is one.

    A run broken off at any moment and started again gives the same bits as one that was not: the checkpoint
    holds the state and the position in the data as one fact, keys follow from the step, and metrics written
    beyond the checkpoint are cut off and written again.

    Args:
      step: from `make_train_step`.
      state: the state to start from; consumed, its buffers are given to the program.
      frozen: arrays the loss reads; put on every device unless they already lie on this mesh.
      batches: position 0; moved to the checkpoint's position on resuming.
      key: the run's key, the same on every process.
      config: the resolved config, saved beside the weights and logged.
      callbacks: run in order after the steps they ask for, with the step and the state, before the state is saved.
      steps: the step to stop after, counted from the very first run.
      log_every: metrics are written every this many steps.
      save_every: checkpoints are written every this many steps, and after the last.
      max_skipped: so many steps in a row without a finite gradient stop the run.
      profile_steps: (first, last) steps to trace into profile_dir; (0, 0) for none.

    Raises:
      ValueError: the devices cannot share the batch, or the checkpoint is of other weights.
      FloatingPointError: max_skipped steps in a row had no finite gradient.
      OSError: a checkpoint could not be written.
      Preempted: SIGTERM came; the state is saved, and the process exits with 0 unless this is caught.
    """
    with Preemption() as preemption:
        state, first = resume(state, mesh, batches, checkpoints, writer)
        if first >= steps:
            return state
        frozen, key = devices.replicate(frozen, mesh), devices.replicate_key(key, mesh)
        compiled, batch_size, flops = compile_step(step, state, frozen, batches, key, mesh)
        writer.write_hparams(config)
        progress = Progress(steps, "steps", done=first)
        ledger = Ledger(writer, progress, StepCost(batch_size, flops), first, log_every, max_skipped)
        profile = Profile(profile_steps, profile_dir)

        batch = devices.global_batch(next(batches), mesh)
        for now in range(first + 1, steps + 1):
            profile.before(now)
            state, metrics = compiled(state, frozen, batch, key)
            ledger.add(now, metrics)  # reads the step before, while this one runs
            profile.after(now, metrics)
            checkpoints.check()  # or a run whose disk is full would go on for nothing

            stopping = preemption.requested(now)
            for callback in callbacks:
                if now % callback.steps == 0 or now == steps:
                    ledger.settle()
                    callback.run(now, state)
            if now % save_every == 0 or now == steps or stopping:
                ledger.settle()
                writer.flush()
                checkpoints.save(now, state, batches.state(), config)
            if now == steps or stopping:
                break
            batch = devices.global_batch(next(batches), mesh)  # not before the position is saved

        progress.close()
        checkpoints.wait()
        if now < steps:
            raise Preempted()
        return state


def resume(
    state: TrainState, mesh: Mesh, batches: Batches, checkpoints: Checkpoints, writer: Writer
) -> tuple[TrainState, int]:
    """The state in its shards, and how many steps it has seen; batches and metrics are moved to that step."""
    first = checkpoints.latest()
    if first is None:
        writer.resume(0)
        return devices.shard(state, mesh), 0
    like = devices.abstract(state, mesh)
    jax.tree.map(lambda leaf: leaf.delete(), state)  # or there would be two states on the device
    state, position = checkpoints.restore(like)
    batches.restore(position)
    writer.resume(first)
    log.info("resumed from step %d", first)
    return state, first


def compile_step(
    step: TrainStep, state: TrainState, frozen: PyTree, batches: Batches, key: Key, mesh: Mesh
) -> tuple[jax.stages.Compiled, int, float]:
    """Compiles before any data is read, and tells cost and memory.

    Returns:
      The program, which takes over the state's buffers; the global batch size; FLOP a step.
    """
    batch = devices.abstract_batch(batches.spec(), mesh)
    batch_size = next(iter(batch.values())).shape[0]
    devices.check_batch_size("batch_size", batch_size, mesh, step.accumulate)
    began = time.monotonic()
    lowered = lower_step(step, state, frozen, batch, key, mesh)
    compiled = lowered.compile()
    flops = step_flops(lowered, step.accumulate)
    log.info(describe(compiled, flops, time.monotonic() - began))
    return compiled, batch_size, flops


def lower_step(
    step: TrainStep, state: TrainState, frozen: PyTree, batch: PyTree, key: Key, mesh: Mesh
) -> jax.stages.Lowered:
    """The step that takes over the state's buffers and gives the next state in the same shards; shapes are enough."""
    out = jax.tree.map(lambda leaf: leaf.sharding, state), devices.replicated(mesh)
    return jax.jit(step.update, donate_argnums=0, out_shardings=out).lower(state, frozen, batch, key)


class StepCost(NamedTuple):
    """Samples and FLOPs of one step on all devices together."""

    samples: int
    flops: float


class Ledger:
    """Reads each step's metrics one step late, so that devices do not wait for the host; writes and checks them."""

    def __init__(
        self, writer: Writer, progress: Progress, cost: StepCost, first: int, log_every: int, max_skipped: int
    ):
        self._writer = writer
        self._progress = progress
        self._cost = cost
        self._log_every = log_every
        self._max_skipped = max_skipped
        self._skipped = 0
        self._waiting: tuple[int, Metrics] | None = None
        self._start = time.monotonic()
        self._shown = first, self._start  # step and time of the last progress line

    def add(self, step: int, metrics: Metrics) -> None:
        """Takes today's metrics without waiting for them, and settles yesterday's."""
        self.settle()
        self._waiting = step, metrics

    def settle(self) -> None:
        """Waits for the metrics taken last; writes them if it is time to.

        Raises:
          FloatingPointError: too many steps in a row without a finite gradient.
        """
        if self._waiting is None:
            return
        step, metrics = self._waiting
        self._waiting = None
        scalars = {name: value.item() for name, value in jax.device_get(metrics).items()}
        if step % self._log_every == 0:
            self._writer.write_scalars(step, scalars)
        if self._progress.advance(loss=scalars["loss"]):
            self._writer.write_speed(step, self._rates(step))
        self._count_skipped(step, scalars)

    def _rates(self, step: int) -> dict[str, float]:
        """Rates since the last progress line, so that they follow the current speed."""
        (step_before, before), now = self._shown, time.monotonic()
        self._shown = step, now
        found = rates(step - step_before, max(now - before, 1e-9), self._cost.samples, self._cost.flops)
        return found | {"elapsed_s": now - self._start}

    def _count_skipped(self, step: int, scalars: Mapping[str, float]) -> None:
        self._skipped = self._skipped + 1 if scalars["skipped"] else 0
        if self._skipped:
            log.warning("step %d skipped: its gradient is not finite (loss %s)", step, scalars["loss"])
        if self._skipped >= self._max_skipped:
            self._writer.flush()
            raise FloatingPointError(
                f"steps {step - self._skipped + 1} to {step} had no finite gradient (loss {scalars['loss']}), and "
                f"max_skipped={self._max_skipped}: lower the learning rate, or compute in fp32"
            )


class Profile:
    """Traces steps first to last into a directory that TensorBoard's profile plugin opens."""

    def __init__(self, steps: tuple[int, int], directory: str):
        self._first, self._last = steps
        self._directory = directory
        self._running = False

    def before(self, step: int) -> None:
        if step == self._first:
            jax.profiler.start_trace(self._directory)
            self._running = True

    def after(self, step: int, metrics: Metrics) -> None:
        """Ends the trace when the step is done, not only started."""
        if self._running and step == self._last:
            jax.block_until_ready(metrics)
            jax.profiler.stop_trace()
