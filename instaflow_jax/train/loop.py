"""The training loop, which pretraining, reflow and distillation share."""

import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from instaflow_jax.arrays import Key
from instaflow_jax.infra import cost, devices
from instaflow_jax.infra.checkpoint import Checkpoints
from instaflow_jax.infra.metrics import Writer
from instaflow_jax.infra.preemption import Preempted, Preemption
from instaflow_jax.infra.progress import Progress
from instaflow_jax.models import layers
from instaflow_jax.train.batches import Batches
from instaflow_jax.train.state import TrainState
from instaflow_jax.train.step import Metrics, TrainStep

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Callback:
    """A function of (step, state) that runs every `every` steps and after the last, such as an evaluation."""

    every: int
    run: Callable[[int, TrainState], None]


def train(
    step: TrainStep,
    create: Callable[[], TrainState],
    like: PyTree,
    frozen: PyTree,
    batches: Batches,
    *,
    key: Key,
    mesh: Mesh,
    checkpoints: Checkpoints,
    writer: Writer,
    config: Mapping[str, Any],
    callbacks: Sequence[Callback],
    steps: int,
    log_every: int,
    save_every: int,
    max_skipped: int,
    profile_steps: tuple[int, int],
    profile_dir: str,
) -> TrainState:
    """Trains until `steps`, from the newest checkpoint if there is one.

    A run that is killed at any moment and started again ends with the same bits as an uninterrupted one: a checkpoint
    holds the state together with the position in the data, keys depend on the step only, and metrics after the
    checkpoint are deleted and written again.

    Args:
      step: from `make_train_step`.
      create: makes the initial state in its shards; called only where there is no checkpoint.
      like: the shapes of that state, with shardings.
      frozen: arrays that the loss reads; copied to every device unless they are on this mesh already.
      batches: at position 0; moved to the checkpoint's position if the run resumes.
      key: the run's key, the same on every process.
      config: the resolved config, saved with the weights and logged.
      callbacks: run in order, before the state is saved.
      steps: number of the last step, counted from the start of the first run.
      log_every: steps between two rows of metrics.
      save_every: steps between two checkpoints; the last step is always saved.
      max_skipped: the run fails after this many steps in a row without a finite gradient.
      profile_steps: (first, last) steps to trace into profile_dir; (0, 0) for none.

    Raises:
      ValueError: the devices cannot share the batch, or the checkpoint holds other weights.
      FloatingPointError: the gradient was not finite for max_skipped steps in a row.
      OSError: a checkpoint could not be written.
      Preempted: after SIGTERM, when the state is saved; ends the process with exit code 0 unless it is caught.
    """
    with Preemption() as preemption, ThreadPoolExecutor(1) as beside:
        checkpoints.check_newest(like)  # before the compiler, which takes minutes, starts
        frozen, key = devices.replicate(frozen, mesh), devices.replicate_key(key, mesh)
        if (checkpoints.latest() or 0) < steps:
            compiling = beside.submit(lower_step(step, like, frozen, batches, key, mesh))
        state, first = start(create, like, batches, checkpoints, writer)  # while the compiler works
        if first >= steps:
            return state
        compiled, batch_size, flops, seconds = compiling.result()
        beside.submit(lambda: log.info(cost.describe(compiled, flops, seconds)))  # reads for a while what XLA planned
        progress = Progress(steps, "steps", done=first)
        rates = functools.partial(cost.rates, samples_per_step=batch_size, flops_per_step=flops)
        metrics_log = MetricsLog(writer, progress, rates, first, log_every, max_skipped)
        profile = Profile(profile_steps, profile_dir)

        batch = devices.global_batch(next(batches), mesh)
        for current in range(first + 1, steps + 1):
            profile.before(current)
            state, metrics = compiled(state, frozen, batch, key)
            if current == first + 1:
                writer.write_hparams(config)  # imports TensorFlow, while the first step runs
            metrics_log.add(current, metrics)  # logs the previous step while this one runs
            profile.after(current, metrics)
            checkpoints.check()  # fail now, not at the next save, if the disk is full

            stopping = preemption.requested(current)
            for callback in callbacks:
                if current % callback.every == 0 or current == steps:
                    metrics_log.wait()
                    callback.run(current, state)
            if current % save_every == 0 or current == steps or stopping:
                metrics_log.wait()
                writer.flush()
                checkpoints.save(current, state, batches.state(), config)
            if current == steps or stopping:
                break
            batch = devices.global_batch(next(batches), mesh)  # after the position is saved

        progress.close()
        checkpoints.wait()
        if current < steps:
            raise Preempted()
        return state


def start(
    create: Callable[[], TrainState], like: PyTree, batches: Batches, checkpoints: Checkpoints, writer: Writer
) -> tuple[TrainState, int]:
    """The newest state, or a new one, and the number of its steps; `batches` and `writer` are moved to that step."""
    first = checkpoints.latest()
    if first is None:
        writer.start(0)
        return create(), 0
    state, position = checkpoints.restore(like)
    batches.restore(position)
    writer.start(first)
    log.info("resumed from step %d", first)
    return state, first


def lower_step(
    step: TrainStep, state: PyTree, frozen: PyTree, batches: Batches, key: Key, mesh: Mesh
) -> Callable[[], tuple[jax.stages.Compiled, int, float, float]]:
    """Traces and lowers the step before any data is read. This is Python; the compiler is not, so it can run beside it.

    Args:
      state: a TrainState, or its shapes with shardings.

    Returns:
      A function that compiles the step. It returns the compiled step, which donates the state; the global batch size;
      FLOPs per step; the seconds since tracing began.
    """
    batch = devices.abstract_batch(batches.spec(), mesh)
    batch_size = next(iter(batch.values())).shape[0]
    devices.check_batch_size("batch_size", batch_size, mesh, step.accumulate)
    start = time.monotonic()
    traced = trace_step(step, state, frozen, batch, key, mesh)
    lowered = traced.lower()

    def compile_it() -> tuple[jax.stages.Compiled, int, float, float]:
        with ThreadPoolExecutor(1) as beside:
            counting = beside.submit(count_flops, traced, step, state, frozen, batch, key)  # while the compiler works
            compiled, flops = lowered.compile(), counting.result()
        return compiled, batch_size, flops, time.monotonic() - start

    return compile_it


def trace_step(
    step: TrainStep, state: PyTree, frozen: PyTree, batch: PyTree, key: Key | jax.ShapeDtypeStruct, mesh: Mesh
) -> jax.stages.Traced:
    """The step, which donates the state and returns the next one in the same shards; takes arrays or shapes."""
    out = jax.tree.map(lambda leaf: leaf.sharding, state), devices.replicated(mesh)
    with jax.set_mesh(mesh):  # for kernels that split their rows themselves
        return jax.jit(step.update, donate_argnums=0, out_shardings=out).trace(state, frozen, batch, key)


def count_flops(traced: jax.stages.Traced, step: TrainStep, *inputs: PyTree) -> float:
    """FLOPs of a step on all devices together, without what it recomputes to save memory (model FLOPs)."""
    if cost.recomputes(traced.jaxpr):
        return model_flops(step.gradients, *inputs)
    return cost.count_flops(traced.jaxpr)


def model_flops(function: Callable[..., PyTree], *inputs: PyTree) -> float:
    """FLOPs of function(*inputs), arrays or shapes, traced with networks that recompute nothing."""
    with layers.without_remat():
        return cost.count_flops(jax.make_jaxpr(function)(*inputs))


class MetricsLog:
    """Reads each step's metrics one step later, so that devices do not wait for the host; writes and checks them."""

    def __init__(
        self,
        writer: Writer,
        progress: Progress,
        rates: Callable[[int, float], dict[str, float]],
        first: int,
        log_every: int,
        max_skipped: int,
    ):
        self._writer, self._progress, self._rates = writer, progress, rates
        self._log_every, self._max_skipped = log_every, max_skipped
        self._skipped = 0
        self._pending: tuple[int, Metrics] | None = None
        self._start = time.monotonic()
        self._shown = first, self._start  # step and time of the last progress line

    def add(self, step: int, metrics: Metrics) -> None:
        """Keeps these metrics without waiting for them, after `wait` for the previous ones."""
        self.wait()
        self._pending = step, metrics

    def wait(self) -> None:
        """Waits for the metrics of the last step and logs them.

        Raises:
          FloatingPointError: too many steps in a row without a finite gradient.
        """
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        scalars = {name: value.item() for name, value in jax.device_get(metrics).items()}
        if step % self._log_every == 0:
            self._writer.write_scalars(step, scalars)
        self._show(step, scalars["loss"])
        self._count_skipped(step, scalars)

    def _show(self, step: int, loss: float) -> None:
        """Advances the progress line, with rates since the last line, so that they follow the current speed."""
        (last_step, last), now = self._shown, time.monotonic()
        rates = self._rates(step - last_step, max(now - last, 1e-9))
        names = {"tflop_per_s": "TFLOP/s", "mfu": "MFU"}
        if self._progress.advance(loss=loss, **{names[key]: rates[key] for key in names if rates.get(key)}):
            self._shown = step, now
            self._writer.write_speed(step, rates | {"elapsed_s": now - self._start})

    def _count_skipped(self, step: int, scalars: Mapping[str, float]) -> None:
        self._skipped = self._skipped + 1 if scalars["skipped"] else 0
        if self._skipped:
            log.warning("step %d skipped: its gradient is not finite (loss %s)", step, scalars["loss"])
        if self._skipped >= self._max_skipped:
            self._writer.flush()
            raise FloatingPointError(
                f"the gradients of steps {step - self._skipped + 1} to {step} are not finite (loss {scalars['loss']}), "
                f"and max_skipped={self._max_skipped}: use a lower learning rate, or float32"
            )


class Profile:
    """Traces steps first to last into a directory for TensorBoard's profile plugin."""

    def __init__(self, steps: tuple[int, int], directory: str):
        self._first, self._last = steps
        self._directory = directory
        self._running = False

    def before(self, step: int) -> None:
        if step == self._first:
            jax.profiler.start_trace(self._directory)
            self._running = True

    def after(self, step: int, metrics: Metrics) -> None:
        """Ends the trace after the last step, once the devices have finished it."""
        if self._running and step == self._last:
            jax.block_until_ready(metrics)
            jax.profiler.stop_trace()
