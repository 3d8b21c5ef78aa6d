"""Rows as a Markdown table, below a line with the machine and all versions."""

import contextlib
import datetime
import importlib.metadata
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path

from benchmarks.timing import Row, Timing
from instaflow_jax.infra.messages import markdown_table

PACKAGES = ("jax", "flax", "torch", "diffusers", "transformers")
HEAD = (
    "what",
    "ours",
    "peer",
    "the peer's",
    "ratio",
    "core seconds, ours / peer's",
    "spread, ours / peer's",
    "ours, GFLOP/s",
    "peak GiB, ours / peer's",
    "first run, ours / peer's",
)


def machine(suite: str) -> str:
    """The processor's name, cores and memory; and the GPU's for the GPU suite."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    named = [line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    found = (
        f"{platform.node()}, {os.cpu_count()} cores, {named[0] if named else platform.processor()}, {memory:.0f} GiB"
    )
    return f"{found}; {cards()}" if suite == "gpu" else found


def cards() -> str:
    """Names and driver of this machine's NVIDIA cards. Raises OSError if there is no driver."""
    query = ("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    return subprocess.run(query, check=True, capture_output=True, text=True).stdout.strip()


def versions() -> str:
    """Of Python and of those packages that are installed."""
    found = [f"Python {platform.python_version()}"]
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join(found)


def render(rows: Sequence[Row], suite: str, repeats: int) -> str:
    """The table; a ratio above 1 means that we are faster."""
    today = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    head = (
        f"Suite {suite}, {today}. Machine: {machine(suite)}. {versions()}.\n\nMedians of {repeats} repeats in turn. "
        "Ratio: the peer's median time / ours. Core seconds: CPU time of all\n"
        "cores, and their ratio. Spread: (slowest - fastest) / median.\n\n"
    )
    return head + markdown_table(HEAD, map(cells, rows))


def cells(row: Row) -> list[str]:
    """One line of the table."""
    ours, theirs = row.ours, row.theirs
    speed = f"{ours.flops / ours.median / 1e9:.0f}" if ours.flops else "–"
    return [
        row.title,
        pace(ours),
        row.peer,
        pace(theirs),
        f"{row.ratio:.2f}",
        work(row),
        f"{ours.spread:.0%} / {theirs.spread:.0%}",
        speed,
        f"{gib(ours)} / {gib(theirs)}",
        f"{seconds(ours.first)} / {seconds(theirs.first)}",
    ]


def pace(timing: Timing) -> str:
    """The median, and the rate if a run makes several."""
    rate = f" ({timing.count / timing.median:.3g}/s)" if timing.count > 1 else ""
    return seconds(timing.median) + rate


def work(row: Row) -> str:
    """Medians of the CPU time of all cores, and their ratio."""
    ours, theirs = (statistics.median(side.core_seconds) for side in (row.ours, row.theirs))
    return f"{ours:.3g} / {theirs:.3g} ({theirs / ours:.2f})"


def seconds(value: float) -> str:
    return f"{1000 * value:.3g} ms" if value < 0.9995 else f"{value:.3g} s"


def gib(timing: Timing) -> str:
    return f"{timing.peak / 2**30:.2f}"
