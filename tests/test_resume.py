"""Runs that are killed at random moments, or preempted, end with the same bits as an uninterrupted run."""

import signal
import time

import numpy as np
import pytest
import toy_training as toy

STEPS = 40
KILLS = 4

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fast_compilation")]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, cache):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    toy.finish(workdir, toy.start(workdir, STEPS, cache=cache))
    return workdir


def assert_same(workdir, uninterrupted):
    """Compares parameters, EMA, optimizer and metrics bit for bit."""
    assert (workdir / "metrics.jsonl").read_bytes() == (uninterrupted / "metrics.jsonl").read_bytes()
    ours, theirs = (np.load(path / "result.npz") for path in (workdir, uninterrupted))
    assert ours.keys() == theirs.keys()
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def wait_for_checkpoint(workdir, process):
    """Waits until the run has started to write a checkpoint, or has ended."""
    before = sorted(workdir.glob("checkpoints/*"))
    while process.poll() is None and sorted(workdir.glob("checkpoints/*")) == before:
        time.sleep(0.001)


def test_a_run_killed_at_random_moments_ends_the_same(tmp_path, cache, uninterrupted):
    random = np.random.default_rng(0)
    ends = []
    for attempt in range(KILLS):
        process = toy.start(tmp_path, STEPS, cache=cache)
        wait_for_checkpoint(tmp_path, process)  # it is being written, under a temporary name
        time.sleep(random.uniform(0, 0.3) if attempt else 0)
        process.kill()
        ends.append(process.wait())
    toy.finish(tmp_path, toy.start(tmp_path, STEPS, cache=cache))
    assert -signal.SIGKILL in ends
    assert_same(tmp_path, uninterrupted)


def test_a_preempted_run_saves_and_ends_the_same(tmp_path, cache, uninterrupted):
    process = toy.start(tmp_path, STEPS, cache=cache)
    wait_for_checkpoint(tmp_path, process)
    process.terminate()
    assert process.wait(timeout=60) == 0
    assert not (tmp_path / "result.npz").exists()
    toy.finish(tmp_path, toy.start(tmp_path, STEPS, cache=cache))
    assert_same(tmp_path, uninterrupted)
