import contextlib
import dataclasses
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_training as toy
from helpers import flip

from instaflow_jax.infra import checkpoint, devices
from instaflow_jax.infra.checkpoint import Checkpoints
from instaflow_jax.train import state

CONFIG = {"optim": {"peak": 1e-3}, "name": "toy"}


@pytest.fixture
def mesh():
    return devices.make_mesh(fsdp=1)


def some_state(seed=0):
    """A state of random arrays, so that it does not compress and exchanged arrays are noticed."""
    made = state.create(toy.params(jax.random.key(seed)), toy.optimizer())
    leaves, structure = jax.tree.flatten(made)
    random = np.random.default_rng(seed)
    return jax.tree.unflatten(structure, [jnp.asarray(random.uniform(0, 99, a.shape), a.dtype) for a in leaves])


def save(directory, steps, *, keep_last=2, keep_every=0, item=None):
    checkpoints = Checkpoints(directory, keep_last=keep_last, keep_every=keep_every)
    for step in steps:
        checkpoints.save(step, some_state(step) if item is None else item, {"step": step}, CONFIG)
    checkpoints.close()


def restore(directory, like):
    checkpoints = Checkpoints(directory, keep_last=2, keep_every=0)
    try:
        return checkpoints.restore(like)
    finally:
        checkpoints.close()


def assert_equal(a, b):
    a, b = toy.leaves(a), toy.leaves(b)
    assert a.keys() == b.keys()
    for name, values in a.items():
        assert values.dtype == b[name].dtype
        np.testing.assert_array_equal(values, b[name], err_msg=name)


def test_a_saved_state_is_restored(tmp_path, mesh):
    save(tmp_path, [3, 7])
    found, position = restore(tmp_path, devices.abstract(some_state(), mesh))
    assert_equal(found, some_state(7))
    assert position == {"step": 7}
    assert checkpoint.load_config(tmp_path, step=3) == CONFIG


def test_dotted_names_and_bfloat16_are_restored(tmp_path, mesh):
    """Names that are prefixes of one another, and a dtype that numpy does not have."""
    params = {"a": jnp.ones(3), "a.b": jnp.ones(2, jnp.bfloat16), "a.b.c": jnp.float32(4), "0.a/b": jnp.ones(1)}
    made = state.create(params, toy.optimizer())
    save(tmp_path, [1], item=made)
    assert_equal(restore(tmp_path, devices.abstract(made, mesh))[0], made)


def test_only_ema_is_read(tmp_path, mesh):
    save(tmp_path, [3, 7])
    for item in ("params", "optimizer"):
        for path in sorted((tmp_path / "7" / item).rglob("*")):
            if path.is_file():
                path.unlink()
    assert_equal(checkpoint.load_weights(tmp_path, "ema", mesh, step=None, like=None), some_state(7).ema)
    assert_equal(checkpoint.load_weights(tmp_path, "ema", mesh, step=3, like=some_state().ema), some_state(3).ema)


def test_the_newest_and_every_nth_are_kept(tmp_path):
    save(tmp_path, range(1, 8), keep_last=2, keep_every=3)
    assert checkpoint.complete_steps(tmp_path) == [3, 6, 7]
    with pytest.raises(ValueError, match="keep_last=0"):
        Checkpoints(tmp_path, keep_last=0, keep_every=0)


def test_an_incomplete_checkpoint_is_ignored_and_deleted(tmp_path, mesh):
    save(tmp_path, [3])
    (tmp_path / "9.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    assert checkpoint.complete_steps(tmp_path) == [3]
    assert_equal(restore(tmp_path, devices.abstract(some_state(), mesh))[0], some_state(3))
    save(tmp_path, [9])
    assert checkpoint.complete_steps(tmp_path) == [3, 9]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "9"]


def test_a_missing_checkpoint_is_named(tmp_path, mesh):
    with pytest.raises(FileNotFoundError, match="no checkpoint yet"):
        restore(tmp_path, devices.abstract(some_state(), mesh))
    save(tmp_path, [3])
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 4, only of \[3\]"):
        checkpoint.load_weights(tmp_path, "ema", mesh, step=4, like=None)


def test_all_arrays_that_do_not_match_are_named(tmp_path, mesh):
    save(tmp_path, [3])
    params = some_state().params
    bias = params["up.bias"]
    wanted = {"up.kernel": params["up.kernel"].T, "up.bias": bias.astype(jnp.bfloat16), "new": bias}
    with pytest.raises(ValueError, match="not the expected ones") as refused:
        checkpoint.load_weights(tmp_path, "ema", mesh, step=None, like=wanted)
    for offender in (
        "missing: new",
        "unexpected: down.kernel",
        "up.kernel: saved (128, 256) float32, expected (256, 128) float32",
        "up.bias: saved (256,) float32, expected (256,) bfloat16",
    ):
        assert offender in str(refused.value)
    assert "\n" not in str(refused.value)


def test_another_optimizer_is_refused(tmp_path, mesh):
    save(tmp_path, [3])
    like = dataclasses.replace(some_state(), opt_state={"momentum": jnp.zeros(3)})
    with pytest.raises(ValueError, match=r"missing: opt_state\.momentum"):
        restore(tmp_path, devices.abstract(like, mesh))


def test_the_state_may_be_donated_during_the_write(tmp_path, mesh):
    advance = jax.jit(lambda state: jax.tree.map(lambda a: a + 1, state), donate_argnums=0)
    checkpoints = Checkpoints(tmp_path, keep_last=1, keep_every=0)
    current = some_state(5)
    for step in range(1, 6):
        saved = {name: values.copy() for name, values in toy.leaves(current).items()}
        checkpoints.save(step, current, {}, {})
        for _ in range(20):
            current = advance(current)
    checkpoints.close()
    found, _ = restore(tmp_path, devices.abstract(current, mesh))
    for name, values in toy.leaves(found).items():
        np.testing.assert_array_equal(values, saved[name], err_msg=name)


def save_and_wait(checkpoints):
    checkpoints.save(9, some_state(), {}, {})
    checkpoints.wait()


@contextlib.contextmanager
def full_disk():
    """Limits files to 20 kB, which the system reports like a full disk.

    The limit also applies to pytest's own output if that goes to a file, so use it for as few lines as possible.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_error_and_older_checkpoints_stay_readable(tmp_path, mesh):
    save(tmp_path, [3, 6])
    checkpoints = Checkpoints(tmp_path, keep_last=1, keep_every=0)
    with full_disk():  # to the end, because the background thread must not find space again
        with pytest.raises(OSError, match=r"cannot write a checkpoint.*steps \[3, 6\] are complete"):
            save_and_wait(checkpoints)
        assert checkpoint.complete_steps(tmp_path) == [3, 6]
        assert_equal(restore(tmp_path, devices.abstract(some_state(), mesh))[0], some_state(6))


# ---------------------------------------------------------------- damage


def files_of(folder):
    """All files but those that mark a checkpoint as complete, which nothing is read from."""
    marks = ("_CHECKPOINT_METADATA", "commit_success.txt")
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in marks)


def test_a_flipped_bit_in_any_file_is_named_with_the_newest_undamaged_step(tmp_path, mesh):
    save(tmp_path, [3, 7])
    like = devices.abstract(some_state(), mesh)
    paths = files_of(tmp_path / "7")
    assert {path.relative_to(tmp_path / "7").parts[0] for path in paths} == {*checkpoint.ITEMS, "checksums.json"}
    for path in paths:
        before = path.read_bytes()
        if not before:
            continue
        flip(path)
        with pytest.raises(
            ValueError, match=r"is damaged.*; the newest undamaged checkpoint is that of step 3"
        ) as error:
            restore(tmp_path, like)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
        path.write_bytes(before)
    assert_equal(restore(tmp_path, like)[0], some_state(7))


def test_damage_is_found_when_weights_and_configs_are_read(tmp_path, mesh):
    save(tmp_path, [3])
    largest = max(files_of(tmp_path / "3" / "ema"), key=lambda path: path.stat().st_size)
    flip(largest)
    with pytest.raises(ValueError, match="no other checkpoint is undamaged"):
        checkpoint.load_weights(tmp_path, "ema", mesh, step=None, like=None)
    checkpoint.load_weights(tmp_path, "params", mesh, step=None, like=None)  # another item
    flip(tmp_path / "3" / "config" / "metadata")
    with pytest.raises(ValueError, match="config/metadata is damaged"):
        checkpoint.load_config(tmp_path, step=3)
    largest.unlink()
    with pytest.raises(ValueError, match=r"is missing, though checksums\.json lists it"):
        checkpoint.load_weights(tmp_path, "ema", mesh, step=None, like=None)


def test_checkpoints_without_checksums_are_read_and_checks_can_be_turned_off(tmp_path, mesh):
    save(tmp_path, [3])
    like = devices.abstract(some_state(), mesh)
    (tmp_path / "3" / "data" / "metadata").write_text('{"step": 4}')
    checkpoints = Checkpoints(tmp_path, keep_last=2, keep_every=0, verify=False)
    assert checkpoints.restore(like)[1] == {"step": 4}
    checkpoints.close()
    (tmp_path / "3" / "checksums.json").unlink()  # version 0.1 wrote none
    assert restore(tmp_path, like)[1] == {"step": 4}
