"""Metrics to disk: JSON lines that survive a kill without a lost or a doubled step, and TensorBoard through clu."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from instaflow_jax.infra.files import atomic_write


class Writer:
    """Where a run's numbers and pictures go; this one forgets them, for processes other than the first."""

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """What training computed; equal for a run that was broken off and resumed, and one that was not."""

    def write_speed(self, step: int, scalars: Mapping[str, float]) -> None:
        """What the clock said; different every time."""

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Pictures by name, uint8 [N, H, W, 3]."""

    def write_hparams(self, hparams: Mapping[str, object]) -> None:
        """The resolved config, nested or flat."""

    def resume(self, step: int) -> None:
        """Forgets the scalars after `step`, which the resumed run is about to write again."""

    def flush(self) -> None:
        """Returns once every scalar written so far is on disk."""

    def close(self) -> None:
        """Flushes and lets go."""


class DiskWriter(Writer):
    """metrics.jsonl, speed.jsonl and hparams.json under a directory, and clu's writers beside them.

    TensorBoard shows steps twice where a resumed run repeated them, since its files cannot be cut;
    metrics.jsonl does not. Pictures go to clu's writers alone.
    """

    def __init__(self, directory: Path, boards: Sequence):
        directory.mkdir(parents=True, exist_ok=True)
        self._metrics = directory / "metrics.jsonl"
        self._speed = directory / "speed.jsonl"
        self._hparams = directory / "hparams.json"
        self._boards = boards

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        append(self._metrics, json_line(step, scalars))
        for board in self._boards:
            board.write_scalars(step, scalars)

    def write_speed(self, step: int, scalars: Mapping[str, float]) -> None:
        append(self._speed, json_line(step, scalars))
        for board in self._boards:
            board.write_scalars(step, {f"speed/{name}": value for name, value in scalars.items()})

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        for board in self._boards:
            board.write_images(step, images)

    def write_hparams(self, hparams: Mapping[str, object]) -> None:
        flat = flatten(hparams)
        self._hparams.write_text(json.dumps(flat, indent=1) + "\n")
        for board in self._boards:
            board.write_hparams(flat)

    def resume(self, step: int) -> None:
        if self._metrics.exists():
            truncate(self._metrics, step)

    def flush(self) -> None:
        with self._metrics.open("a") as file:
            os.fsync(file.fileno())
        for board in self._boards:
            board.flush()

    def close(self) -> None:
        self.flush()
        for board in self._boards:
            board.close()


def make_writer(directory: str | Path, *, tensorboard: bool) -> Writer:
    """The writer of this process: to disk in the first, to nowhere in the others.

    Args:
      tensorboard: also write TensorBoard events under directory/tensorboard. clu's writers load TensorFlow,
        several seconds, hence imported here and not at the top.
    """
    if jax.process_index() > 0:
        return Writer()
    boards = []
    if tensorboard:
        from clu import metric_writers

        boards = [metric_writers.AsyncWriter(metric_writers.SummaryWriter(str(Path(directory) / "tensorboard")))]
    return DiskWriter(Path(directory), boards)


def append(path: Path, text: str) -> None:
    """Adds to the end of a file, at once, so that a killed process has not kept it to itself."""
    with path.open("a") as file:
        file.write(text)


def json_line(step: int, scalars: Mapping[str, float]) -> str:
    """One strict JSON object and a newline; what is not finite becomes null."""
    values = {name: float(value) for name, value in scalars.items()}
    row = {"step": step} | {name: value if math.isfinite(value) else None for name, value in values.items()}
    return json.dumps(row) + "\n"


def read_json_lines(path: str | Path) -> list[dict[str, float | None]]:
    """The rows of metrics.jsonl; a last line broken off by a kill is left out."""
    lines = Path(path).read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def truncate(path: Path, step: int) -> None:
    """Keeps the rows up to and with `step`; a half-written last line goes. Atomic: a new file takes the name."""
    rows = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    kept = [line for line in rows if json.loads(line)["step"] <= step]
    with atomic_write(path) as temporary:
        temporary.write_text("".join(kept))


def flatten(config: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """A nested config as one level of dotted names, for `write_hparams`."""
    flat: dict[str, object] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return flat
