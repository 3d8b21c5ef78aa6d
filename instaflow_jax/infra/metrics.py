"""Metrics: JSON lines in which a killed and resumed run leaves every step once, and TensorBoard through clu."""

import json
import math
import os
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from instaflow_jax.infra import stores
from instaflow_jax.infra.files import naming, write_json, write_text

Scalars = Mapping[str, float | np.floating]


class Writer:
    """Writes a run's metrics and images; this base class discards them, for processes other than the first."""

    def start(self, step: int) -> None:
        """Comes before all else: deletes the scalars after `step`, which the run writes again."""

    def write_scalars(self, step: int, scalars: Scalars) -> None:
        """Results of training; a killed and resumed run writes the same as an uninterrupted one."""

    def write_speed(self, step: int, scalars: Scalars) -> None:
        """Timings; they differ between runs."""

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Images by name, uint8 [N, H, W, 3]."""

    def write_hparams(self, hparams: Mapping[str, object]) -> None:
        """The resolved config, nested or flat."""

    def flush(self) -> None:
        """Returns once every scalar written so far is on disk, or in the bucket of the workdir."""

    def close(self) -> None:
        """Flushes and releases the files."""


class Board:
    """TensorBoard's event files, written by clu in a thread of its own.

    clu is imported at the first write and there, because it imports TensorFlow: seconds in which a run that is started
    again reads its compiled step. A write that fails raises OSError at the next call.
    """

    def __init__(self, directory: Path):
        self._directory = directory
        self._thread = ThreadPoolExecutor(1)
        self._writes: deque[Future] = deque()
        self._writer: Any = None

    def submit(self, method: str, *args: Any) -> None:
        """Calls a method of clu's `MetricWriter` after the earlier ones, without waiting for it."""
        while self._writes and self._writes[0].done():
            self._take_first()
        self._writes.append(self._thread.submit(self._call, method, args))

    def wait(self, method: str) -> None:
        """The same, and returns once it is done; nothing if nothing was ever written."""
        if self._writes or self._writer:
            self.submit(method)
            while self._writes:
                self._take_first()

    def _take_first(self) -> None:
        """Waits for the oldest write."""
        try:
            self._writes.popleft().result()
        except Exception as error:  # TensorFlow has classes of its own
            raise OSError(
                f"cannot write TensorBoard's files in {self._directory} ({error}): free some space and run again, or "
                "use --config.tensorboard=False"
            ) from error

    def _call(self, method: str, args: tuple[Any, ...]) -> None:
        if self._writer is None:
            from clu import metric_writers

            self._writer = metric_writers.SummaryWriter(str(self._directory))
        getattr(self._writer, method)(*args)


class DiskWriter(Writer):
    """Writes metrics.jsonl, speed.jsonl and hparams.json in a directory, and the same numbers for TensorBoard.

    Images go to TensorBoard only. Its files cannot be truncated, so there a resumed run shows its repeated steps twice.
    """

    def __init__(self, directory: Path, tensorboard: bool):
        directory.mkdir(parents=True, exist_ok=True)
        self._metrics = directory / "metrics.jsonl"
        self._speed = directory / "speed.jsonl"
        self._hparams = directory / "hparams.json"
        self._boards = [Board(directory / "tensorboard")] if tensorboard else []

    def start(self, step: int) -> None:
        if self._metrics.exists():
            truncate(self._metrics, step)

    def write_scalars(self, step: int, scalars: Scalars) -> None:
        append(self._metrics, json_line(step, scalars))
        for board in self._boards:
            board.submit("write_scalars", step, scalars)

    def write_speed(self, step: int, scalars: Scalars) -> None:
        append(self._speed, json_line(step, scalars))
        for board in self._boards:
            board.submit("write_scalars", step, {f"speed/{name}": value for name, value in scalars.items()})

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        for board in self._boards:
            board.submit("write_images", step, images)

    def write_hparams(self, hparams: Mapping[str, object]) -> None:
        flat = flatten(hparams)
        write_json(self._hparams, flat)
        for board in self._boards:
            board.submit("write_hparams", flat)

    def flush(self) -> None:
        with self._metrics.open("a") as file:
            os.fsync(file.fileno())
        for board in self._boards:
            board.wait("flush")
        stores.sync()

    def close(self) -> None:
        self.flush()
        for board in self._boards:
            board.wait("close")


def make_writer(directory: str | Path, *, tensorboard: bool) -> Writer:
    """The writer of this process: a `DiskWriter` in the first, one that discards everything in the others.

    Args:
      tensorboard: also write TensorBoard events to directory/tensorboard.
    """
    if jax.process_index() > 0:
        return Writer()
    return DiskWriter(Path(directory), tensorboard)


def append(path: Path, text: str) -> None:
    """Appends to a file and closes it, so that nothing stays in the buffers of a process that is killed."""
    with naming(path, len(text)), path.open("a") as file:
        file.write(text)


def json_line(step: int, scalars: Scalars) -> str:
    """One strict JSON object and a newline; values that are not finite become null."""
    values = {name: float(value) for name, value in scalars.items()}
    row = {"step": step} | {name: value if math.isfinite(value) else None for name, value in values.items()}
    return json.dumps(row) + "\n"


def read_json_lines(path: str | Path) -> list[dict[str, float | None]]:
    """The rows of metrics.jsonl, without an incomplete last line."""
    lines = Path(path).read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def truncate(path: Path, step: int) -> None:
    """Deletes, atomically, the rows after `step` and an incomplete last line."""
    rows = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    write_text(path, "".join(line for line in rows if json.loads(line)["step"] <= step))


def flatten(config: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """A nested config as one level of dotted names."""
    flat: dict[str, object] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return flat
