"""The GPU drill: what only a card can show, in one run of at most 25 minutes.

    launch/gpu_drill.sh [--out=runs/drill] [--minutes=25]     # installs what is missing, then runs this:
    python -m benchmarks.drill [--out=DIR] [--minutes=25] [--only=parity,demo] [--dry_run]
    python -m benchmarks.drill --table=DIR/drill.json         # the tables for benchmarks/RESULTS.md

Each part runs in a process of its own with a time limit; one that fails is one line, and the rest goes on. After each
part DIR/drill.json and DIR/drill.md are written. The same command runs what is left: first the parts that were never
tried, then the failed ones. DIR/kept has each part's log, the card's autotuning results and its target configuration;
DIR/kept.tar.gz the same in one file. --dry_run runs every kind of part on the CPU with tiny networks.
"""

import argparse
import contextlib
import dataclasses
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import drill_table, run, sizes
from benchmarks.table import cards
from instaflow_jax.infra.files import read_json, write_json, write_text

RESULTS, KEPT = "drill.json", "kept"
MIN_SECONDS = 30.0  # a part is not started with less time left
EIGHT = "eight devices"
Entry = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Part:
    """A function of `benchmarks.drill_parts` with its arguments, and its time limit.

    Attributes:
      flags: added to XLA_FLAGS; {folder} is the part's own folder.
    """

    name: str
    function: str
    arguments: tuple[str, ...] = ()
    minutes: float = 5.0
    flags: str = "--xla_gpu_dump_autotune_results_to={folder}/autotune.textproto"


def parts(dry_run: bool) -> list[Part]:
    """All parts, the most telling first."""
    size = sizes.DRY if dry_run else sizes.CARD
    networks, programs = ("unet", "vae", "encoder", "clip", "lpips"), ("reflow_sd15", "distill_sd15_lpips")
    if dry_run:
        networks, programs = ("clip",), ("reflow_openmoji",)
    groups = [Part(name, "timing", (name,)) for name in run.gpu(size.compiled, size)]
    telling = [part for part in groups if part.name in size.telling]
    return [
        Part("card", "card", minutes=2.0, flags="--xla_dump_to={folder}"),
        *(Part(f"parity, {name}", "parity", (name,), 4.0) for name in networks),
        *telling,
        Part("demo", "demo", minutes=6.0),
        Part(f"{EIGHT}, {programs[0]}", "eight", programs[:1]),
        *(part for part in groups if part not in telling and not dry_run),
        *(Part(f"{EIGHT}, {name}", "eight", (name,)) for name in programs[1:]),
    ]


def choose(found: list[Part], only: str) -> list[Part]:
    """The parts whose names begin with one of the texts in `only`; "" means all. Raises ValueError if none."""
    texts, names = only.split(","), [part.name for part in found]
    for text in texts:
        if not any(name.startswith(text) for name in names):
            raise ValueError(f"--only={only}: no part's name begins with {text!r}; they are: {'; '.join(names)}")
    return [part for part in found if part.name.startswith(tuple(texts))]


# ---------------------------------------------------------------- one part


def run_part(part: Part, folder: Path, size: str, seconds: float) -> Entry:
    """The part's result, or a line in "error"; its processes are ended after `seconds`."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    result, log = folder / "result.json", folder / "log.txt"
    command = [sys.executable, "-m", "benchmarks.drill_parts", part.function, size, str(folder), str(result)]
    start = time.monotonic()
    with log.open("w") as file:
        child = subprocess.Popen(
            [*command, *part.arguments],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment(part, folder, size),
            start_new_session=True,
        )
        try:
            code = child.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:  # the sides of a comparison too, also if the drill itself is interrupted
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    entry = {"seconds": time.monotonic() - start}
    entry |= read_json(result) if code == 0 else {"error": "out of time" if code is None else f"exit code {code}"}
    if "error" in entry:
        entry["error"] += ": " + last_error(log.read_text(errors="replace"))
    return entry


def environment(part: Part, folder: Path, size: str) -> dict[str, str]:
    """This process's, with what the part's processes need; a dry run sees no card."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} {part.flags.format(folder=shlex.quote(str(folder)))}"
    found = os.environ | run.ENVIRONMENT | run.SHARED_CARD | {"XLA_FLAGS": flags.strip()}
    if size == "dry":
        found |= {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "true", "CUDA_VISIBLE_DEVICES": ""}
    return found


def last_error(log: str) -> str:
    """The last line that names an error, else the last line; at most 300 characters."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"(error: |[\w.]*(Error|Exception|Interrupt)\b)", line)]
    return (named or lines or ["it printed nothing"])[-1][:300]


# ---------------------------------------------------------------- all parts


def drill(todo: Sequence[Part], out: Path, size: str, minutes: float) -> dict[str, Any]:
    """Runs the parts that `out`/drill.json lacks, writes it after each, and returns it.

    Raises:
      ValueError: that file is of another card or size.
    """
    results, deadline = open_results(out, size), time.monotonic() + 60 * minutes
    done = results["parts"]
    left = [part for part in todo if "error" in done.get(part.name, {"error": ""})]
    left.sort(key=lambda part: part.name in done)
    for number, part in enumerate(left, 1):
        remaining = deadline - time.monotonic()
        seconds = min(60 * part.minutes, remaining)
        if remaining < MIN_SECONDS:
            print(
                f"{len(left) - number + 1} parts are left and the time is over: run the same command again", flush=True
            )
            break
        print(f"[{number}/{len(left)}] {part.name}: at most {seconds:.0f} s, {remaining:.0f} s are left", flush=True)
        done[part.name] = run_part(part, out / KEPT / slug(part.name), size, seconds)
        save(out, results)
        print("\n".join(f"    {line}" for line in drill_table.summary(done[part.name])), flush=True)
    archive(out)
    return results


def open_results(out: Path, size: str) -> dict[str, Any]:
    """The results so far. Raises ValueError if they are of another card or size."""
    here = {"size": size, "cards": "none" if size == "dry" else cards()}
    if not (out / RESULTS).exists():
        return here | {"parts": {}}
    found = read_json(out / RESULTS)
    for name, value in here.items():
        if found[name] != value:
            raise ValueError(f"{out / RESULTS} has {name}={found[name]!r}, this run {value!r}; use another --out")
    return found


def save(out: Path, results: dict[str, Any]) -> None:
    write_json(out / RESULTS, results)
    write_text(out / "drill.md", drill_table.render(results))


def slug(name: str) -> str:
    return re.sub(r"\W+", "_", name)


def archive(out: Path) -> None:
    """DIR/kept.tar.gz: logs, autotuning results and target configuration, without the demo's models."""
    kept = [path for path in (out / KEPT).rglob("*") if path.suffix in (".txt", ".textproto", ".pbtxt")]
    with tarfile.open(out / f"{KEPT}.tar.gz", "w:gz") as file:
        for path in sorted(kept):
            file.add(path, path.relative_to(out))


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/drill"))
    parser.add_argument("--minutes", type=float, default=25.0, help="no part runs longer than this from the start")
    parser.add_argument("--dry_run", action="store_true", help="on the CPU, with tiny networks")
    parser.add_argument("--table", type=Path, help="only print the tables of this drill.json")
    parser.add_argument("--only", default="", help="beginnings of the names of parts, separated by commas")
    options = parser.parse_args(arguments)
    if options.table:
        print(drill_table.render(read_json(options.table)))
        return 0
    size = "dry" if options.dry_run else "card"
    try:
        todo = choose(parts(options.dry_run), options.only)
        results = drill(todo, options.out.absolute(), size, options.minutes)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    failed = [name for name, entry in results["parts"].items() if "error" in entry]
    missing = [part.name for part in todo if part.name not in results["parts"]]
    print(f"{len(failed)} parts failed, {len(missing)} were not run; {options.out / RESULTS}")
    return 1 if failed or missing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
