"""Two sides of a comparison, each in its own process, timed in turn.

Separate processes have separate memory peaks and threads; taking turns exposes both to the same disturbances.
"""

import contextlib
import dataclasses
import importlib
import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock


def peak_memory() -> int:
    """Peak bytes of this process since `forget_peak`, or since its start if the system cannot reset the peak."""
    status = Path("/proc/self/status")
    if status.is_file():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def forget_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


@dataclasses.dataclass(frozen=True)
class Call:
    """Something to time.

    Attributes:
      run: runs it and waits until it is done.
      count: images, samples or pairs that one run makes.
      flops: floating-point operations of a run; 0 if unknown.
      memory: peak bytes of the last run.
    """

    run: Callable[[], object]
    count: int = 1
    flops: float = 0.0
    memory: Callable[[], int] = peak_memory


def step_title(loss: str, remat: str, batch: int) -> str:
    """What both sides call a complete training step."""
    return f"{loss} step, remat {remat}, batch {batch}"


@dataclasses.dataclass(frozen=True)
class Spec:
    """How a side is made: `module.function(**options)`, called in the side's own process, returns its calls by title.

    It is a name, not a function, so that one side's process never imports what the other needs. `environment` is
    added to that process's environment.
    """

    module: str
    function: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def make(self) -> dict[str, Call]:
        return getattr(importlib.import_module(self.module), self.function)(**self.options)


@dataclasses.dataclass(frozen=True)
class Timing:
    """One side of a row: seconds of the first run (with compilation), wall and core seconds per repeat, peak bytes."""

    first: float
    seconds: tuple[float, ...]
    core_seconds: tuple[float, ...]
    peak: int
    count: int = 1
    flops: float = 0.0

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """(slowest − fastest repeat) / median."""
        return (max(self.seconds) - min(self.seconds)) / self.median


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison with one peer."""

    title: str
    peer: str
    ours: Timing
    theirs: Timing

    @property
    def ratio(self) -> float:
        """The peer's median time / ours."""
        return self.theirs.median / self.ours.median


class Side:
    """A process that holds one side's models and runs calls on request."""

    def __init__(self, spec: Spec):
        context = multiprocessing.get_context("spawn")
        self._line, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(spec, theirs), daemon=False)
        with mock.patch.dict(os.environ, spec.environment):
            self._process.start()
        theirs.close()
        self.titles: dict[str, tuple[int, float]] = self._line.recv()

    def run(self, title: str) -> tuple[float, float, int]:
        """Wall seconds, core seconds and peak bytes of one run.

        Raises:
          EOFError: the process ended.
        """
        self._line.send(title)
        return self._line.recv()

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *_) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._line.send(None)
        self._process.join()


def serve(spec: Spec, line: Connection) -> None:
    """The loop of a side's process: makes its calls, then runs each title it receives until it receives None."""
    calls = spec.make()
    line.send({title: (call.count, call.flops) for title, call in calls.items()})
    while (title := line.recv()) is not None:
        forget_peak()
        start, cores = time.perf_counter(), core_seconds()
        calls[title].run()
        line.send((time.perf_counter() - start, core_seconds() - cores, calls[title].memory()))


def compare(ours: Side, theirs: Side, peer: str, repeats: int, only: str = "") -> list[Row]:
    """A row per call that both sides have: a first run, then `repeats` in turn.

    Args:
      only: beginning of the titles that are run.

    Raises:
      EOFError: a side ended.
    """
    titles = [title for title in ours.titles if title in theirs.titles and title.startswith(only)]
    return [Row(title, peer, *take_turns((ours, theirs), title, repeats)) for title in titles]


def take_turns(sides: tuple[Side, Side], title: str, repeats: int) -> tuple[Timing, Timing]:
    first = [side.run(title)[0] for side in sides]
    runs = [[side.run(title) for side in sides] for _ in range(repeats)]
    print(
        f"{title}: {[[(round(r[0], 3), round(r[1], 3)) for r in pair] for pair in runs]}", file=sys.stderr, flush=True
    )
    return tuple(
        Timing(
            first[i],
            *(tuple(pair[i][j] for pair in runs) for j in (0, 1)),
            max(pair[i][2] for pair in runs),
            *side.titles[title],
        )
        for i, side in enumerate(sides)
    )


def core_seconds() -> float:
    """CPU time of this process and its finished children; steadier than wall time on a shared machine."""
    return sum(
        used.ru_utime + used.ru_stime
        for used in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def process(arguments: list[str], environment: Mapping[str, str]) -> Call:
    """A program that each run starts as a new process.

    Raises:
      RuntimeError: it failed.
    """
    peaks = []

    def run():
        with open(os.devnull, "w") as nowhere:
            child = os.posix_spawnp(
                arguments[0],
                arguments,
                {**os.environ, **environment},
                file_actions=[(os.POSIX_SPAWN_DUP2, nowhere.fileno(), 1)],
            )
            _, status, usage = os.wait4(child, 0)
        if status:
            raise RuntimeError(f"{' '.join(arguments)[:200]} ended with {os.waitstatus_to_exitcode(status)}")
        peaks.append(usage.ru_maxrss * 1024)

    return Call(run, memory=lambda: peaks[-1])
