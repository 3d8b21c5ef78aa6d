"""Runs killed at random moments, and asked to stop, end with the bits of a run left alone."""

import signal
import time

import numpy as np
import pytest
import toy_training as toy

STEPS = 40
KILLS = 4


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, cache):
    workdir = tmp_path_factory.mktemp("unbroken")
    toy.finish(workdir, toy.start(workdir, STEPS, cache=cache))
    return workdir


def assert_same(workdir, unbroken):
    """Parameters, EMA, optimiser and metrics, to the bit."""
    assert (workdir / "metrics.jsonl").read_bytes() == (unbroken / "metrics.jsonl").read_bytes()
    ours, theirs = (np.load(path / "result.npz") for path in (workdir, unbroken))
    assert ours.keys() == theirs.keys()
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def wait_for_news(workdir, process):
    """Until the run has written something since it was started (or ended)."""
    before = sorted(workdir.glob("checkpoints/*"))
    while process.poll() is None and sorted(workdir.glob("checkpoints/*")) == before:
        time.sleep(0.001)


def test_killed_at_random_moments_it_ends_the_same(tmp_path, cache, unbroken):
    random = np.random.default_rng(0)
    ends = []
    for attempt in range(KILLS):
        process = toy.start(tmp_path, STEPS, cache=cache)
        wait_for_news(tmp_path, process)  # a checkpoint is being written, under its temporary name
        time.sleep(random.uniform(0, 0.3) if attempt else 0)
        process.kill()
        ends.append(process.wait())
    toy.finish(tmp_path, toy.start(tmp_path, STEPS, cache=cache))
    assert -signal.SIGKILL in ends
    assert_same(tmp_path, unbroken)


def test_asked_to_stop_it_saves_and_ends_the_same(tmp_path, cache, unbroken):
    process = toy.start(tmp_path, STEPS, cache=cache)
    wait_for_news(tmp_path, process)
    process.terminate()
    assert process.wait(timeout=60) == 0
    assert not (tmp_path / "result.npz").exists()
    toy.finish(tmp_path, toy.start(tmp_path, STEPS, cache=cache))
    assert_same(tmp_path, unbroken)
