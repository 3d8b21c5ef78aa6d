"""The progress reporter, on tqdm: a bar on a terminal, otherwise a line every 30 seconds."""

import io
import os
import sys

import jax
from tqdm import tqdm

_FORMAT = (
    "{desc}{n_fmt}/{total_fmt}{unit} ({percentage:.0f} %) · {rate_noinv_fmt} · "
    "{elapsed} elapsed, {remaining} left{postfix}"
)


class Progress:
    """Shows finished and total units, rate, elapsed and remaining time, in the first process only."""

    def __init__(self, total: int, unit: str, *, title: str = "", done: int = 0, file: io.TextIOBase | None = None):
        """
        Args:
          total: number of units to finish.
          unit: name of the units, in the plural: "pairs", "steps".
          title: text before the numbers.
          done: units that an earlier run finished.
          file: defaults to standard error.
        """
        self._file = sys.stderr if file is None else file
        self._terminal = self._file.isatty()
        self._sink = open(os.devnull, "w")  # noqa: SIM115 (open until `close`)
        self._total, self._done = total, done
        self._bar = tqdm(
            total=total,
            initial=done,
            unit=f" {unit}",
            desc=title and f"{title}: ",
            file=self._file if self._terminal else self._sink,
            disable=jax.process_index() > 0,
            mininterval=0.5 if self._terminal else 30.0,
            miniters=1,
            dynamic_ncols=self._terminal,
            bar_format=_FORMAT,
        )

    def advance(self, count: int = 1, **numbers: float | str) -> bool:
        """Counts finished units, with `numbers` (loss=0.1) shown beside them; returns whether it wrote anything."""
        self._done += count
        if numbers:
            self._bar.set_postfix(numbers, refresh=False)
        refreshed = bool(self._bar.update(count))
        if self._done >= self._total and not refreshed and not self._bar.disable:
            refreshed = bool(self._bar.refresh())  # always show the last unit
        if refreshed and not self._terminal:
            print(self._bar, file=self._file, flush=True)
        return refreshed

    def close(self) -> None:
        """Ends the bar; a terminal's cursor moves to the next line."""
        self._bar.close()
        self._sink.close()


def clock_time(seconds: float) -> str:
    """1:02:03, or 02:03 below the hour."""
    return tqdm.format_interval(round(seconds))
