"""A small demo that is killed at each stage ends with the same files as a demo that was never killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, make_tiny

pytestmark = pytest.mark.slow

# The shipped config with small numbers, but several shards and several checkpoints.
RUN = """
import sys
import helpers
from configs import demo
from instaflow_jax import main
from instaflow_jax.data.openmoji import dataset
from instaflow_jax.stages.common import flow_training
dataset.load = lambda *_: helpers.make_emoji()
flow_training.make_evaluate = lambda *_: lambda ema, path: {}
config = helpers.shrink_demo(demo.get_config(), sys.argv[1])
config.generate.update({"count": 16, "shard_size": 4})
for name in ("reflow", "distill", "direct"):
    config[name].loop.update({"steps": 6, "save_every": 2})
config.export.formats = ("orbax", "diffusers")
main.run(config, sys.argv[2])
"""
# Moments are random; 20 kills (4, 4, 3, 3, 4, 2) passed on 2026-11-26.
KILLS = {"generate": 1, "reflow": 1, "distill": 1, "direct": 1, "evaluate": 1, "export": 1}
# What holds seconds or dates: times of the steps, the report and the card that print them, Orbax's own files.
UNEQUAL = {
    "demo.json",
    "report.html",
    "speed.jsonl",
    "table.md",
    "README.md",
    "checksums.json",
    "log.txt",
    "checkpoints",
    "orbax",
    "measured",
}


def start(tiny: Path, workdir: Path, cache: Path) -> subprocess.Popen:
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))),
    }
    command = [sys.executable, "-c", RUN, str(tiny), str(workdir)]
    with (workdir / "log.txt").open("ab") as log:
        return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log)


def finish(process: subprocess.Popen, workdir: Path) -> None:
    assert process.wait(timeout=600) == 0, (workdir / "log.txt").read_text()[-2000:]


def paths(workdir: Path) -> set[str]:
    """Every path below `workdir`, temporary ones too."""
    return {os.path.join(folder, name) for folder, names, files in os.walk(workdir) for name in (*names, *files)}


def wait_for_step(process: subprocess.Popen, workdir: Path, name: str) -> None:
    """Until the demo has begun the step, or has ended."""
    while process.poll() is None:
        ledger = workdir / "demo.json"
        if ledger.is_file() and name in json.loads(ledger.read_text())["steps"]:
            return
        time.sleep(0.01)


def wait_for_writes(process: subprocess.Popen, workdir: Path, count: int) -> None:
    """Until files have appeared `count` times, or the demo has ended."""
    seen = paths(workdir)
    while process.poll() is None and count:
        now = paths(workdir)
        count -= not now <= seen
        seen |= now
        time.sleep(0.001)


def products(workdir: Path) -> dict[str, Path]:
    """The files that have to be equal, by name."""
    found = {path.relative_to(workdir).as_posix(): path for path in workdir.rglob("*") if path.is_file()}
    return {name: path for name, path in found.items() if not UNEQUAL & {*Path(name).parts}}


def without_seconds(results: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in json.loads(results.read_text())["rows"]]


def test_a_demo_killed_at_each_stage_ends_the_same(tmp_path):
    tiny, unbroken, killed = (tmp_path / name for name in ("tiny", "unbroken", "killed"))
    for folder in (tiny, killed):
        folder.mkdir()
    make_tiny(tiny)
    finish(start(tiny, killed, tmp_path / "cache"), killed)
    killed.rename(unbroken)  # made under the same path, which the manifests mention
    killed.mkdir()
    random = np.random.default_rng(0)
    ends = []
    for step, kills in KILLS.items():
        for _ in range(kills):
            process = start(tiny, killed, tmp_path / "cache")
            wait_for_step(process, killed, step)
            wait_for_writes(process, killed, int(random.integers(0, 5)))
            time.sleep(random.uniform(0, 0.1))
            process.kill()
            ends.append(process.wait())
    finish(start(tiny, killed, tmp_path / "cache"), killed)

    steps = json.loads((killed / "demo.json").read_text())["steps"]
    assert ends == [-signal.SIGKILL] * sum(KILLS.values())
    assert list(steps) == list(KILLS) and all(step["runs"] > 1 for step in steps.values())
    expected, found = products(unbroken), products(killed)
    assert found.keys() == expected.keys()
    assert {name.split("/")[0] for name in expected} >= {"pairs", "reflow", "distill", "direct", "evaluate", "export"}
    for name, path in expected.items():
        if name.endswith("results.json"):
            assert without_seconds(found[name]) == without_seconds(path)
        else:
            assert found[name].read_bytes() == path.read_bytes(), name
