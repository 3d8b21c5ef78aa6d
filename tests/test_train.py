import dataclasses
import functools
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy_training as toy

from instaflow_jax.infra import checkpoint, devices, metrics
from instaflow_jax.infra.preemption import Preempted
from instaflow_jax.train import batches, loop, optim, state, step


@pytest.fixture(scope="module", autouse=True)
def compile_once(tmp_path_factory):
    with toy.compile_once(tmp_path_factory.mktemp("compiled")):
        yield


@pytest.fixture
def mesh():
    return devices.make_mesh(fsdp=1)


def one_step(loss, accumulate=1):
    return step.make_train_step(loss, toy.optimizer(), devices.make_mesh(fsdp=1), ema_decay=0.99, accumulate=accumulate)


def some_batch():
    return {"row": jnp.arange(8, dtype=jnp.int32)}


def run_step(loss, start, accumulate=1, frozen=None):
    update = jax.jit(one_step(loss, accumulate).update)
    return update(start, toy.frozen() if frozen is None else frozen, some_batch(), jax.random.key(2))


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, toy.leaves(a), toy.leaves(b))


def test_ema_follows_the_ramp_then_the_decay():
    decays = [float(state.ema_decay_at(jnp.int32(n), 0.9)) for n in (0, 1, 90, 100_000)]
    np.testing.assert_allclose(decays, [0.1, 2 / 11, 0.9, 0.9], rtol=1e-6)


def test_ema_moves_towards_the_new_parameters(mesh):
    start = toy.new_state(mesh)
    after, _ = run_step(toy.loss, start)
    for name, new in after.params.items():
        expected = 0.1 * start.ema[name] + 0.9 * new  # decay at n = 0 is 1 / 10
        np.testing.assert_allclose(after.ema[name], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_update_is_optax_adamw_with_clipping_and_decay_of_kernels_only(mesh):
    fields = {"b1": 0.9, "b2": 0.99, "eps": 1e-8, "weight_decay": 0.1}
    ours = optim.make_optimizer(optim.make_schedule("constant", peak=1e-2, warmup_steps=0), **fields, clip=0.5)
    adamw = optax.adamw(1e-2, **fields, mask=lambda params: {name: "kernel" in name for name in params})
    theirs = optax.chain(optax.clip_by_global_norm(0.5), adamw)
    params = toy.params(jax.random.key(0)) | {"up.bias": jnp.ones(2 * toy.WIDTH)}
    grads = jax.grad(lambda p: 10 * toy.quiet_loss(p, toy.frozen(), some_batch(), None)[0])(params)
    norm = optax.tree.norm(grads)
    assert norm > 0.5
    our_updates, their_updates = (
        jax.jit(lambda g, o=o, more=more: o.update(g, o.init(params), params, **more)[0])(grads)
        for o, more in ((ours, {"norm": norm}), (theirs, {}))
    )
    for name, expected in their_updates.items():
        np.testing.assert_allclose(our_updates[name], expected, rtol=1e-5, atol=1e-9)


def test_a_step_equals_the_optimizer_on_each_array_by_itself(mesh):
    start = toy.new_state(mesh)
    after, found = run_step(toy.quiet_loss, start)
    grads = jax.grad(lambda p: toy.quiet_loss(p, toy.frozen(), some_batch(), None)[0])(start.params)
    update = jax.jit(toy.optimizer().update)
    updates, opt_state = update(grads, start.opt_state, start.params, norm=optax.tree.norm(grads))
    expected = optax.apply_updates(start.params, updates)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-8)
    jax.tree.map(close, (after.params, after.opt_state), (expected, opt_state))
    for name, tree in (("update_norm", updates), ("param_norm", expected)):
        close(found[name], optax.tree.norm(tree))


def test_packing_joins_vectors_and_splits_them_again():
    params = {"c": jnp.arange(3.0), "b": jnp.ones((2, 2)), "a": jnp.arange(3.0, 5.0)}
    tree = params, {}, toy.optimizer().init(params)
    pack, unpack = state.packing(params)
    packed = pack(tree)
    assert packed[0].keys() == {"b", "vectors"} and packed[1] == {}
    np.testing.assert_array_equal(packed[0]["vectors"], np.arange(5.0))
    assert len(jax.tree.leaves(packed)) == len(jax.tree.leaves(tree)) - 3
    jax.tree.map(np.testing.assert_array_equal, unpack(packed), tree)
    pack, unpack = state.packing({"a": params["a"], "b": params["b"]})
    assert pack(tree) is tree and unpack(tree) is tree  # one vector needs no copy


@pytest.mark.parametrize("kind", ["constant", "cosine"])
def test_schedule_warms_up_to_its_peak(kind):
    rest = {"cosine": {"total_steps": 40, "end": 1e-5}, "constant": {}}[kind]
    schedule = optim.make_schedule(kind, peak=1e-3, warmup_steps=10, **rest)
    rates = np.array([schedule(n) for n in range(41)])
    np.testing.assert_allclose(rates[:11], np.linspace(0, 1e-3, 11), rtol=1e-5)
    np.testing.assert_allclose(rates[40], {"constant": 1e-3, "cosine": 1e-5}[kind], rtol=1e-4)
    assert (np.diff(rates[10:]) <= 0).all()


def test_unknown_schedules_and_long_warm_ups_are_refused():
    with pytest.raises(ValueError, match="use one of"):
        optim.make_schedule("linear", peak=1.0, warmup_steps=1)
    with pytest.raises(ValueError, match="warmup_steps=5"):
        optim.make_schedule("cosine", peak=1.0, warmup_steps=5, total_steps=5, end=0.0)


def test_scalars_hold_the_learning_rate(mesh):
    after, first = run_step(toy.loss, toy.new_state(mesh))
    _, second = run_step(toy.loss, after)
    np.testing.assert_allclose([first["learning_rate"], second["learning_rate"]], [0, 1e-2 / 3], rtol=1e-6)


def test_micro_batches_equal_one_batch(mesh):
    start = toy.new_state(mesh)
    start, _ = run_step(toy.quiet_loss, start)
    full, full_metrics = run_step(toy.quiet_loss, start)
    parts, parts_metrics = run_step(toy.quiet_loss, start, accumulate=4)
    for name, values in toy.leaves(full.params).items():
        np.testing.assert_allclose(parts.params[name], values, rtol=1e-5, atol=1e-6)
    for name, value in full_metrics.items():
        np.testing.assert_allclose(parts_metrics[name], value, rtol=1e-4, err_msg=name)


@pytest.mark.slow
def test_micro_batches_use_different_keys(mesh):
    def loss(params, frozen, batch, key):
        return jnp.sum(params["up.bias"]) + jax.random.uniform(key), {}

    start = toy.new_state(mesh)
    _, scalars = run_step(loss, start, accumulate=2)
    draws = jax.vmap(jax.random.uniform)(jax.random.split(jax.random.fold_in(jax.random.key(2), 0), 2))
    np.testing.assert_allclose(scalars["loss"], draws.mean(), rtol=1e-6)
    assert draws[0] != draws[1]


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"'row' has 8 rows, which accumulate=3"):
        step.split_batch(some_batch(), 3)
    with pytest.raises(ValueError, match="accumulate=0"):
        one_step(toy.loss, accumulate=0)


def test_every_step_draws_new_noise(mesh):
    def loss(params, frozen, batch, key):
        return jnp.sum(params["up.bias"]) * 0 + jax.random.uniform(key), {}

    after, first = run_step(loss, toy.new_state(mesh))
    _, second = run_step(loss, after)
    assert first["loss"] != second["loss"]


def test_gradients_that_are_not_finite_change_only_the_step_number(mesh):
    start, _ = run_step(toy.loss, toy.new_state(mesh))
    after, scalars = run_step(toy.loss, start, frozen={"data": toy.frozen()["data"] * np.nan})
    assert scalars["skipped"] == 1
    assert int(after.step) == int(start.step) + 1
    for part in ("params", "ema", "opt_state"):
        assert_equal(getattr(after, part), getattr(start, part))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_no_key_is_used_twice(mesh, accumulate):
    def reusing(params, frozen, batch, key):
        value, scalars = toy.loss(params, frozen, batch, key)
        return value, scalars | {"again": jax.random.uniform(key)}

    start = toy.new_state(mesh)
    with jax.debug_key_reuse(True):
        run_step(toy.loss, start, accumulate)
        with pytest.raises(jax.errors.KeyReuseError):
            run_step(reusing, start, accumulate)


def test_the_step_donates_the_state_and_transfers_nothing_to_the_host(mesh):
    start, frozen, source = toy.new_state(mesh), devices.replicate(toy.frozen(), mesh), toy.source()
    key = devices.replicate_key(jax.random.key(1), mesh)
    compiled, *_ = loop.lower_step(one_step(toy.loss), start, frozen, source, key, mesh)()
    batch = devices.global_batch(next(source), mesh)
    with jax.transfer_guard("disallow"):
        with pytest.raises(jax.errors.JaxRuntimeError, match="host-to-device"):  # the guard is active
            compiled(start, frozen, {"row": np.asarray(batch["row"])}, key)
        after, _ = compiled(start, frozen, batch, key)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(start))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((after, frozen, batch, key)))


def test_a_state_does_not_share_buffers(mesh):
    given = toy.params(jax.random.key(0))
    made = state.create(given, toy.optimizer())
    pointers = [a.unsafe_buffer_pointer() for a in (*given.values(), *made.params.values(), *made.ema.values())]
    assert len(set(pointers)) == len(pointers)


def test_training_compiles_once_and_learns(tmp_path):
    traced = []

    def counted(params, frozen, batch, key):
        traced.append(1)
        return toy.loss(params, frozen, batch, key)

    toy.run(tmp_path, 20, step=one_step(counted))
    rows = metrics.read_json_lines(tmp_path / "metrics.jsonl")
    assert len(traced) == 1
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]


@pytest.mark.slow
def test_two_and_two_steps_equal_four(tmp_path):
    full = toy.run(tmp_path / "full", 4)
    toy.run(tmp_path / "parts", 2)
    parts = toy.run(tmp_path / "parts", 4)
    assert_equal(full, parts)
    assert (tmp_path / "full/metrics.jsonl").read_bytes() == (tmp_path / "parts/metrics.jsonl").read_bytes()


def test_a_finished_run_is_returned_unchanged(tmp_path):
    done = toy.run(tmp_path, 2)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    assert_equal(toy.run(tmp_path, 2), done)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_checkpoint_of_other_arrays_is_refused_before_the_compiler_starts(tmp_path, monkeypatch):
    toy.run(tmp_path, 2)
    monkeypatch.setattr(loop, "lower_step", lambda *_: pytest.fail("the compiler started"))

    def other(mesh):
        start = toy.new_state(mesh)
        return dataclasses.replace(start, params={name: value[None] for name, value in start.params.items()})

    with pytest.raises(ValueError, match="not the expected ones"):
        toy.run(tmp_path, 4, create=other)


def test_scalars_after_the_checkpoint_are_written_again(tmp_path):
    class Interrupted(Exception):
        pass

    def interrupt(step_number, _):
        if step_number == 5:
            raise Interrupted

    toy.run(tmp_path / "full", 6)
    with pytest.raises(Interrupted):
        toy.run(tmp_path / "parts", 6, callbacks=[loop.Callback(1, interrupt)])
    assert metrics.read_json_lines(tmp_path / "parts/metrics.jsonl")[-1]["step"] == 5
    toy.run(tmp_path / "parts", 6)
    assert (tmp_path / "full/metrics.jsonl").read_bytes() == (tmp_path / "parts/metrics.jsonl").read_bytes()


def test_callbacks_see_the_state_after_their_steps_and_after_the_last(tmp_path):
    seen = []
    toy.run(tmp_path, 5, callbacks=[loop.Callback(2, lambda number, current: seen.append((number, int(current.step))))])
    assert seen == [(2, 2), (4, 4), (5, 5)]


def test_the_profiled_steps_are_traced(tmp_path):
    toy.run(tmp_path, 4, profile_steps=(2, 3))
    assert len(list((tmp_path / "profile").glob("**/*.xplane.pb"))) == 1


def test_sigterm_saves_and_exits_with_zero(tmp_path):
    def terminate(step_number, _):
        if step_number == 3:
            signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted) as stopped:
        toy.run(tmp_path / "parts", 6, callbacks=[loop.Callback(1, terminate)], save_every=100)
    assert stopped.value.code == 0
    assert signal.getsignal(signal.SIGTERM) is before
    steps = checkpoint.complete_steps(tmp_path / "parts/checkpoints")
    assert len(steps) == 1
    assert 3 <= steps[0] <= 4
    assert_equal(toy.run(tmp_path / "parts", 6), toy.run(tmp_path / "full", 6))


def test_too_many_skipped_steps_in_a_row_stop_the_run(tmp_path):
    bad = np.full((toy.ROWS, toy.WIDTH), np.nan, np.float32)
    with pytest.raises(FloatingPointError, match="gradients of steps 1 to 3 are not finite"):
        toy.run(tmp_path, 10, frozen={"data": bad}, save_every=100)
    last = metrics.read_json_lines(tmp_path / "metrics.jsonl")[-1]
    assert (last["step"], last["loss"], last["grad_norm"], last["skipped"]) == (3, None, None, 1.0)
    assert last["param_norm"] > 0  # the parameters were kept


def test_a_few_skipped_steps_do_not_stop_the_run(tmp_path):
    data = toy.frozen()["data"]
    data[toy.ROWS // 2] = np.nan  # one batch of an epoch of six
    final = toy.run(tmp_path, 12, frozen={"data": data})
    skipped = [row["skipped"] for row in metrics.read_json_lines(tmp_path / "metrics.jsonl")]
    assert sum(skipped) == 2
    assert all(np.isfinite(leaf).all() for leaf in toy.leaves(final).values())


def test_batches_cover_each_epoch_once_in_a_new_order():
    source = toy.source()
    epochs = [np.concatenate([next(source)["row"] for _ in range(toy.ROWS // toy.BATCH)]) for _ in range(2)]
    for rows in epochs:
        np.testing.assert_array_equal(np.sort(rows), np.arange(toy.ROWS))
    assert (epochs[0] != epochs[1]).any()


def test_batches_continue_from_a_position():
    source, other = toy.source(), toy.source()
    for _ in range(7):
        next(source)
    other.restore(source.state())
    np.testing.assert_array_equal(next(source)["row"], next(other)["row"])
    assert source.spec()["row"].shape == next(source)["row"].shape


def test_batches_refuse_arrays_that_do_not_fit():
    with pytest.raises(ValueError, match="equally long"):
        batches.ArrayBatches({"a": np.zeros(3), "b": np.zeros(4)}, batch_size=1, seed=0)
    with pytest.raises(ValueError, match="batch_size=4 must be from 1 to 3"):
        batches.ArrayBatches({"a": np.zeros(3)}, batch_size=4, seed=0)
