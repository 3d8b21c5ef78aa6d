import socket

import jax
import numpy as np
import pytest
import toy_training as toy

from instaflow_jax.infra import cost, devices, metrics

STEPS = 5


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("one")
    return toy.leaves(toy.run(workdir, STEPS)), metrics.read_json_lines(workdir / "metrics.jsonl")


def assert_equal_to_rounding(workdir, one_device):
    """Compares the final state and all metrics; returns the number of the state's elements on one device."""
    state, rows = one_device
    result = dict(np.load(workdir / "result.npz"))
    elements = result.pop("elements_per_device")
    assert result.keys() == state.keys()
    for name, values in state.items():
        np.testing.assert_allclose(result[name], values, rtol=1e-4, atol=2e-6, err_msg=name)
    found = metrics.read_json_lines(workdir / "metrics.jsonl")
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    for new, old in zip(found, rows, strict=True):
        assert new == pytest.approx(old, rel=1e-4)
    return elements


@pytest.mark.slow
def test_eight_devices_equal_one(tmp_path, one_device):
    scripts = [toy.start(tmp_path / str(fsdp), STEPS, fsdp=fsdp, devices=8) for fsdp in (1, 4)]
    toy.finish(tmp_path, *scripts)
    replicated = assert_equal_to_rounding(tmp_path / "1", one_device)
    sharded = assert_equal_to_rounding(tmp_path / "4", one_device)
    assert sharded < 0.3 * replicated


@pytest.mark.slow
def test_two_processes_of_four_devices_equal_one(tmp_path, one_device):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    group = {"fsdp": 4, "devices": 4, "coordinator": address, "processes": 2}
    toy.finish(tmp_path, *[toy.start(tmp_path, STEPS, process=process, **group) for process in range(2)])
    assert_equal_to_rounding(tmp_path, one_device)


@pytest.fixture
def wide():
    """A mesh of eight devices, for rules that only read its shape."""
    return jax.sharding.AbstractMesh((2, 4), devices.AXES)


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((3, 3, 64, 128), (None, None, None, "fsdp")),
        ((3, 3, 128, 64), (None, None, "fsdp", None)),
        ((1022, 64), (None, "fsdp")),  # the largest axis does not divide by 4
        ((1021, 33), ()),
        ((4096,), ()),  # too small to be sharded
        ((), ()),
    ],
)
def test_shape_rule(wide, shape, spec):
    assert tuple(devices.array_sharding(shape, wide).spec) == spec


def test_a_batch_that_devices_cannot_share_is_refused(wide):
    devices.check_batch_size("batch_size", 48, wide, 2)
    with pytest.raises(ValueError, match=r"batch_size=40 must be a multiple of 16 .*use batch_size=32"):
        devices.check_batch_size("batch_size", 40, wide, 2)
    with pytest.raises(ValueError, match="accumulate=0 must be at least 1"):
        devices.check_batch_size("batch_size", 48, wide, 0)


def test_a_mesh_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="fsdp=3 must divide the 1 devices"):
        devices.make_mesh(fsdp=3)


def test_a_mesh_of_given_devices():
    mesh = devices.make_mesh(fsdp=1, devices=jax.devices()[:1])
    assert mesh == devices.make_mesh(fsdp=1)


@pytest.mark.parametrize("gib, once", [(16, False), (32, True)])
def test_what_a_device_holds_whole_takes_at_most_a_quarter_of_its_memory(gib, once, monkeypatch):
    monkeypatch.setattr(devices.cost, "peak", lambda kind: cost.Peak(1.0, 1.0, gib * cost.GIB))
    unet = {"kernel": jax.ShapeDtypeStruct((859_520_964,), np.float32)}
    assert devices.gathers_once(unet, (), devices.make_mesh(fsdp=1)) == once


def test_host_arrays_reach_devices_unchanged():
    mesh = devices.make_mesh(fsdp=1)
    tree = {"a": np.arange(6.0, dtype=np.float32).reshape(2, 3)}
    for put in (devices.shard, devices.replicate, devices.global_batch):
        np.testing.assert_array_equal(put(tree, mesh)["a"], tree["a"])
    key = jax.random.key(5)
    assert jax.random.uniform(devices.replicate_key(key, mesh)) == jax.random.uniform(key)


def test_compiled_programs_are_kept_for_the_user_unless_jax_has_a_folder(monkeypatch, tmp_path):
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        for there, kept in (("/elsewhere", "/elsewhere"), (None, f"{tmp_path}/instaflow_jax/compiled")):
            jax.config.update("jax_compilation_cache_dir", there)
            devices.keep_compiled_programs()
            assert jax.config.jax_compilation_cache_dir == kept
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
