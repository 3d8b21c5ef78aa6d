"""Refinement by distribution matching: losses where their values are known, the step, and the stage when killed."""

import functools
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy_training as toy
from helpers import killed_at, load, normal, refine_config, relative

from instaflow_jax import main, pipeline, sampling, teacher
from instaflow_jax.infra import cost, devices
from instaflow_jax.models.discriminator import Discriminator
from instaflow_jax.models.unet import UNet2DConditionModel
from instaflow_jax.stages import reflow
from instaflow_jax.stages.common import flow_training
from instaflow_jax.train import losses, score_distillation, two_time_scale
from instaflow_jax.train import state as train_state
from instaflow_jax.train.score_distillation import Method, Noised

pytestmark = pytest.mark.usefixtures("fast_compilation")
TEXT = types.SimpleNamespace(
    apply=lambda params, ids: types.SimpleNamespace(last_hidden_state=jnp.asarray(params)[ids])
)
FROZEN = {"text_encoder": normal(9, 16, 3), "null_ids": np.array([[0, 0]])}
BATCH = {"X0": normal(0, 64, 4, 4, 2), "X1": normal(1, 64, 4, 4, 2), "ids": np.arange(128).reshape(64, 2) % 15 + 1}

PROMPTS = FROZEN["text_encoder"][BATCH["ids"]]


def method(student, score, head=None, **fields):
    nets = (types.SimpleNamespace(apply=apply) for apply in (student, score))
    others = {"convention": FLOW, "alpha": 1.0, "steps": (1,), "t": (0.1, 0.9), "prompt_dropout": 0.0}
    head = head and types.SimpleNamespace(apply=head)
    return Method(*nets, TEXT, head, **(others | {"num_timesteps": 1000, "unroll": False} | fields))


# ---------------------------------------------------------------- Gaussians, whose scores are known

DEVIATION = 0.5


FLOW = score_distillation.flow_convention(1000)
SD = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
HEADS = ("epsilon", "v_prediction", "sample")
SCHEDULES = {head: teacher.read_schedule(SD | {"prediction_type": head}) for head in HEADS}


def at(mean):
    return {"mean": jnp.float32(mean)}


def shift(params, Z, tau, text):
    """A student whose images are Gaussian with deviation 0.5 and this mean."""
    return params["mean"] + (DEVIATION - 1) * Z


def gaussian_flow(params, Xt, tau, text):
    """The velocity E[X1 − eps | Xt] of data with this mean and deviation 0.5, in closed form."""
    mean, t = params["mean"], (1 - tau / 1000)[:, None, None, None]
    gain = t * DEVIATION**2 / (t**2 * DEVIATION**2 + (1 - t) ** 2)
    return (mean + gain * (Xt - t * mean) - Xt) / (1 - t)


def gaussian_teacher(params, x, tau, text):
    """The predicted noise E[eps | x] of the same data, under the schedule of SD."""
    t = jnp.interp(tau, jnp.arange(1000), teacher.flow_times(SCHEDULES["epsilon"]))
    Xt = x * jnp.sqrt(t**2 + (1 - t) ** 2)[:, None, None, None]
    v = gaussian_flow(params, Xt, 1000 - 1000 * t, text)
    return Xt - t[:, None, None, None] * v


SCORES = {
    "flow": (gaussian_flow, {}),
    "teacher": (gaussian_teacher, {"convention": score_distillation.teacher_convention(SCHEDULES["epsilon"])}),
}


def test_the_gradient_equals_one_written_in_numpy():
    """DMD, Eq. 7 and 8, for random velocities."""
    x, eps, v_real, v_fake = (normal(i, 5, 4, 4, 2) for i in range(4))
    t = np.linspace(0.05, 0.95, 5, dtype=np.float32)
    Xt, rest = t[:, None, None, None] * x + (1 - t)[:, None, None, None] * eps, (1 - t)[:, None, None, None]
    noised = Noised(eps, t, Xt)
    match = jax.jit(jax.value_and_grad(lambda x: score_distillation.match_scores(x, noised, v_real, v_fake)[0]))
    value, gradient = match(x)
    real, fake = Xt + rest * v_real, Xt + rest * v_fake
    want = (fake - real) / np.abs(x - real).mean((1, 2, 3), keepdims=True)
    assert relative(gradient * x.size, want) < 1e-5
    np.testing.assert_allclose(value, 0.5 * np.mean(want**2), rtol=1e-5)


@pytest.mark.parametrize("name", SCORES)
def test_the_mean_of_a_gaussian_student_moves_to_that_of_the_data(name):
    """With the exact fake score, whose mean is the student's."""
    score, fields = SCORES[name]
    loss = score_distillation.make_student_loss(method(shift, score, **fields), matching=1, regression=0, adversarial=0)
    mean, target, optimizer = at(-1), at(2), optax.adam(0.1)

    @jax.jit
    def step(mean, state, key):
        frozen = FROZEN | {"real": target, "fake": mean}
        (_, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(mean, frozen, BATCH, key)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(mean, updates), state, metrics["score_gap"]

    state, gaps = optimizer.init(mean), []
    for i in range(100):
        mean, state, gap = step(mean, state, jax.random.key(i))
        gaps.append(gap)
    assert abs(mean["mean"] - 2) < 0.1 and gaps[-1] < 0.1 * gaps[0]


def test_the_gradient_is_zero_where_the_scores_agree():
    loss = score_distillation.make_student_loss(method(shift, gaussian_flow), matching=1, regression=0, adversarial=0)
    frozen = FROZEN | {"real": at(1), "fake": at(1)}
    (value, _), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(at(1), frozen, BATCH, jax.random.key(0))
    assert value == 0 and gradient["mean"] == 0


@pytest.mark.parametrize("name", SCORES)
def test_the_fake_score_learns_the_students_distribution(name):
    """The mean that minimises its loss is that of the student's images, not of the pairs'."""
    score, fields = SCORES[name]
    loss = score_distillation.make_fake_loss(method(shift, score, **fields), adversarial=0)

    @jax.jit
    @jax.grad
    def slope(means, key):
        return loss(at(means[0]), FROZEN | {"student": at(means[1])}, BATCH, key)[0]

    slopes = [np.mean([slope((mean, 1.5), jax.random.key(i)) for i in range(20)], 0) for mean in (1.4, 1.5, 1.6)]
    by_fake, by_student = np.transpose(slopes)
    assert by_fake[0] < -3 * abs(by_fake[1]) and by_fake[2] > 3 * abs(by_fake[1])
    assert not by_student.any()


@pytest.mark.parametrize("head", SCHEDULES)
def test_a_teacher_is_a_flow_and_its_own_error_counts(head):
    """Its velocity is `teacher_velocity`'s, and the weighed error that of the network's output."""
    schedule = SCHEDULES[head]
    convention = score_distillation.teacher_convention(schedule)
    out, other, Z = (normal(i, 6, 4, 4, 2) for i in range(3))
    t = np.linspace(*convention.ends, 6, dtype=np.float32)
    parts, noised = method(shift, gaussian_flow, convention=convention), Noised(None, t, Z)
    v, v_other = (score_distillation.velocity(parts, lambda x, tau, out=out: out + x, noised) for out in (out, other))
    for i, (Zi, ti) in enumerate(zip(Z, t, strict=True)):
        velocity = teacher.teacher_velocity(lambda x, tau, i=i: out[i : i + 1] + x, schedule)
        np.testing.assert_allclose(v[i], velocity(Zi[None], ti)[0], rtol=1e-4, atol=1e-4)
    weighed = convention.weight(t) * losses.squared(v - v_other)
    np.testing.assert_allclose(weighed, losses.squared(out - other), rtol=1e-3)


# ---------------------------------------------------------------- the terms


def test_the_real_score_is_guided():
    """By alpha = 3, with the embedding of the empty prompt; the fake score is not."""

    def score(params, Xt, tau, text):
        return params["mean"] * text.mean((1, 2))[:, None, None, None] + 0 * Xt

    predict = score_distillation.real_score(method(shift, score, alpha=3.0), FROZEN | {"real": at(2)}, PROMPTS)
    got = predict(BATCH["X0"], jnp.ones(64))[:, 0, 0, 0]
    null = FROZEN["text_encoder"][FROZEN["null_ids"]].mean()
    np.testing.assert_allclose(got, 3 * 2 * PROMPTS.mean((1, 2)) - 2 * 2 * null, rtol=1e-5)


@pytest.mark.parametrize("unroll", [True, False])
def test_the_student_is_asked_where_a_sampler_of_N_steps_asks_it(unroll):
    """Its images are the X1 that it predicts at points of its own Euler paths, of one, two and four steps."""

    def curved(params, Z, tau, text):
        return params["mean"] - Z * (1 + tau / 1000)[:, None, None, None]

    parts = method(curved, gaussian_flow, steps=(1, 2, 4), unroll=unroll)
    Z, key = BATCH["X0"], jax.random.key(3)
    got = jax.jit(lambda Z: score_distillation.draw(parts, at(0.5), Z, PROMPTS, key, from_noise=np.arange(64) < 8))(Z)
    t, t_next = (np.asarray(each) for each in losses.draw_step(key, (1, 2, 4), 64))
    N, step = np.round(1 / (t_next - t)).astype(int), np.round(t / (t_next - t)).astype(int)
    assert set(zip(N, step, strict=True)) == {(N, i) for N in (1, 2, 4) for i in range(N)}
    for i in range(64):
        now, Zi = 0.0, Z[i : i + 1]
        for _ in range(0 if i < 8 else step[i]):
            Zi, now = Zi + curved(at(0.5), Zi, np.array([1000 - 1000 * now]), None) / N[i], now + 1 / N[i]
        want = Zi + (1 - now) * curved(at(0.5), Zi, np.array([1000 - 1000 * now]), None)
        np.testing.assert_allclose(got[i], want[0], rtol=1e-4, atol=1e-5)


def test_earlier_steps_have_no_gradient():
    """The image of a student that is constant in Z has the gradient 1 − t of its last step."""
    parts = method(lambda params, Z, tau, text: params["mean"] + 0 * Z, gaussian_flow, steps=(4,))
    key = jax.random.key(0)
    slope = jax.grad(lambda p: score_distillation.draw(parts, p, BATCH["X0"], PROMPTS, key).mean())(at(0.5))["mean"]
    np.testing.assert_allclose(slope, np.mean(1 - losses.draw_step(key, (4,), 64)[0]), rtol=1e-5)


@pytest.mark.slow
def test_a_share_of_the_batch_regresses_its_own_pairs():
    seen = []

    def record(params, Z, tau, text):
        seen.append((Z, tau))
        return params["mean"] + 0 * Z

    loss = score_distillation.make_student_loss(
        method(record, gaussian_flow), matching=1, regression=0.25, adversarial=0
    )
    frozen = FROZEN | {"real": at(1), "fake": at(2)}
    value, metrics = loss(at(0.5), frozen, BATCH, jax.random.key(0))
    (Z, tau), *_ = seen  # without jit
    chosen = np.arange(64) % 4 == 0
    np.testing.assert_array_equal(Z[chosen], BATCH["X0"][chosen])
    assert not np.any(Z[~chosen] == BATCH["X0"][~chosen]) and np.all(tau == 1000)
    error = np.mean((BATCH["X0"] + 0.5 - BATCH["X1"])[chosen] ** 2)
    np.testing.assert_allclose(metrics["regression"], error, rtol=1e-5)
    alone = loss(at(0.5), frozen | {"real": at(2)}, BATCH, jax.random.key(0))[0]
    np.testing.assert_allclose(alone, 0.25 * error, rtol=1e-5)  # the scores agree
    assert value > alone
    with pytest.raises(ValueError, match=r"regression=1 must be a share in \[0, 1\)"):
        score_distillation.make_student_loss(method(record, record), matching=1, regression=1, adversarial=0)


@pytest.mark.slow
def test_the_discriminator_tells_real_from_fake_and_the_student_follows():
    """Features are the noised images themselves, divided by t; the head is linear."""

    def score(params, Xt, tau, text, method=""):
        features = Xt / (1 - tau / 1000)[:, None, None, None]
        return {"": 0 * Xt, "middle": features, "with_middle": (0 * Xt, features)}[method]

    def head(params, features):
        return params["slope"] * features.mean((1, 2, 3))

    parts = method(lambda params, Z, tau, text: params["mean"] - 0.9 * Z, score, head)
    fake_loss = score_distillation.make_fake_loss(parts, adversarial=1.0)
    student_loss = score_distillation.make_student_loss(parts, matching=0, regression=0, adversarial=1.0)
    params = {"head.slope": jnp.float32(0), "conv.kernel": jnp.float32(0)}
    batch = BATCH | {"X1": 3 + 0.1 * BATCH["X1"]}
    student, key = FROZEN | {"student": at(0)}, jax.random.key(0)
    slope = jax.grad(lambda p: fake_loss(p, student, batch, key)[0])(params)
    assert slope["head.slope"] < -0.1 and slope["conv.kernel"] == 0  # a descending step makes larger means more real
    trained = params | {"head.slope": jnp.float32(1)}
    assert fake_loss(trained, student, batch, key)[1]["accuracy"] > 0.6
    frozen = FROZEN | {"real": params, "fake": trained}
    (_, metrics), push = jax.value_and_grad(student_loss, has_aux=True)(at(0), frozen, batch, key)
    assert push["mean"] < -0.1 and metrics["adversarial"] == pytest.approx(np.log(2), abs=0.1)


def test_the_head_takes_any_number_of_positions():
    head = Discriminator.from_config({"channels": 8, "norm_num_groups": 4})
    images = [normal(side, 3, side, side, 8) for side in (1, 5)]
    logits = jax.jit(lambda key: [head.apply(head._init(key), features) for features in images])(jax.random.key(0))
    assert all(each.shape == (3,) and np.ptp(each) > 0 for each in logits)


def test_the_middle_block_is_the_same_with_and_without_the_way_up(teacher):
    unet, params = UNet2DConditionModel.from_pretrained(teacher, "unet")
    inputs = normal(0, 2, 4, 4, 4), np.array([1.0, 900.0], np.float32), normal(1, 2, 16, 8)
    methods = ("with_middle", "middle", "__call__")
    (out, middle), alone, called = jax.jit(lambda p: [unet.apply(p, *inputs, method=name) for name in methods])(params)
    np.testing.assert_allclose(middle, alone, rtol=1e-6)
    np.testing.assert_allclose(out, called, rtol=1e-6)
    assert middle.shape == (2, 4, 4, 8) and np.ptp(middle) > 0


def test_fresh_noise_replaces_the_pairs_own():
    seen = {}

    def record(params, Z, tau, text):
        seen.update(Z=Z, t=(1 - tau / 1000)[:, None, None, None])
        return Z

    options = {"time": "uniform", "penalty": "squared", "prompt_dropout": 0.0, "num_timesteps": 1000}
    net = types.SimpleNamespace(apply=record)
    loss = losses.make_reflow_loss(net, TEXT, noise="fresh", **options)
    value, _ = loss(0.0, FROZEN, BATCH, jax.random.key(0))
    eps = (seen["Z"] - seen["t"] * BATCH["X1"]) / (1 - seen["t"])
    assert abs(np.corrcoef(np.ravel(eps), BATCH["X0"].ravel())[0, 1]) < 0.1 and abs(eps.std() - 1) < 0.05
    np.testing.assert_allclose(value, np.mean((seen["Z"] - (BATCH["X1"] - eps)) ** 2), rtol=1e-4)
    with pytest.raises(ValueError, match="noise='old' is unknown: use one of paired, fresh"):
        losses.make_reflow_loss(net, TEXT, noise="old", **options)


# ---------------------------------------------------------------- the step of two networks


def make_step(updates, first, student_loss=None, fake_loss=None):
    """Scalars that move towards each other: the fake towards the student, the student away from the fake."""

    def follow(params, frozen, batch, key):
        return jnp.square(params["a"] - frozen["student"]["a"]), {"draw": jax.random.uniform(key)}

    def flee(params, frozen, batch, key):
        return -params["a"] * (1 + frozen["fake"]["a"]), {"draw": jax.random.uniform(key)}

    optimizers = toy.optim.make_optimizer(toy.optim.make_schedule("constant", peak=0.1, warmup_steps=0), **OPTIM)
    return optimizers, two_time_scale.make_two_time_scale_step(
        student_loss or flee,
        fake_loss or follow,
        optimizers,
        optimizers,
        devices.make_mesh(fsdp=1),
        ema_decay=0.5,
        accumulate=1,
        updates=updates,
        first=first,
        unroll=False,
    )


OPTIM = {"b1": 0.0, "b2": 0.0, "eps": 1e-8, "weight_decay": 0.0, "clip": 1.0}  # each update moves by 0.1


def new_state(optimizer):
    params = {"student": {"a": jnp.float32(1)}, "fake": {"a": jnp.float32(0)}}
    return train_state.create_two(params, optimizer, optimizer)


def test_the_student_waits_and_the_fake_score_is_updated_more_often():
    optimizer, step = make_step(updates=3, first=2)
    now, key, update = new_state(optimizer), jax.random.key(0), jax.jit(step.update)
    rows = []
    for _ in range(3):
        now, metrics = update(now, {}, {"x": jnp.zeros(4)}, key)
        rows.append(metrics)
    assert [int(now.step), int(now.fake.step)] == [3, 9] and not now.fake.ema
    np.testing.assert_allclose(now.fake.params["a"], 0.9, rtol=1e-5)  # nine updates of 0.1
    np.testing.assert_allclose(now.params["a"], 1.1, rtol=1e-5)  # one
    np.testing.assert_allclose(now.ema["a"], 0.25 * 1 + 0.75 * 1.1, rtol=1e-5)  # decay 3 / 12 at step 2
    assert [float(row["loss"]) for row in rows[:2]] == [0, 0] and rows[2]["loss"] == pytest.approx(-1.9, rel=1e-5)
    assert rows[2]["fake_loss"] == pytest.approx(np.mean([0.4**2, 0.3**2, 0.2**2]), rel=1e-4)
    draws = [float(row[name]) for row in rows for name in ("draw", "fake_draw") if row[name]]
    assert len(set(draws)) == 4


def test_a_student_without_a_finite_gradient_leaves_the_fake_score_to_learn():
    optimizer, step = make_step(1, 0, lambda params, frozen, batch, key: (params["a"] * jnp.nan, {}))
    now, metrics = jax.jit(step.update)(new_state(optimizer), {}, {"x": jnp.zeros(4)}, jax.random.key(0))
    assert metrics["skipped"] == 1 and now.params["a"] == 1 and int(now.step) == 1
    np.testing.assert_allclose(now.fake.params["a"], 0.1, rtol=1e-5)


def test_the_arithmetic_of_a_step_is_that_of_its_gradients():
    def loss(params, frozen, batch, key):
        return jnp.sum(batch["x"] @ params["a"]), {}

    optimizer, step = make_step(3, 0, loss, loss)
    params = {name: {"a": jnp.ones((4, 5))} for name in ("student", "fake")}
    inputs = train_state.create_two(params, optimizer, optimizer), {}, {"x": jnp.zeros((6, 4))}, jax.random.key(0)
    update, gradients = (cost.count_flops(jax.make_jaxpr(f)(*inputs)) for f in (step.update, step.gradients))
    assert update == gradients == 4 * (2 * 2 * 6 * 4 * 5)  # the product, and the kernel's gradient


def test_no_key_is_used_twice():
    parts = method(shift, gaussian_flow, steps=(1, 2))
    student = score_distillation.make_student_loss(parts, matching=1, regression=0.25, adversarial=0)
    fake = score_distillation.make_fake_loss(parts, adversarial=0)
    frozen = FROZEN | {"real": at(0), "fake": at(0), "student": at(0)}
    with jax.debug_key_reuse(True):
        for loss in (student, fake):
            jax.jit(loss)(at(0), frozen, BATCH, jax.random.key(0))


def train_toys(workdir, steps):
    """The toy networks on two time scales, in the common loop: the student also learns the fake one's biases."""

    def student_loss(params, frozen, batch, key):
        value, metrics = toy.loss(params, frozen, batch, key)
        return value + jnp.mean((params["up.bias"] - frozen["fake"]["up.bias"]) ** 2), metrics

    def fake_loss(params, frozen, batch, key):
        return toy.loss(params, {"data": frozen["data"] * frozen["student"]["up.bias"][0]}, batch, key)

    optimizer = toy.optimizer()
    step = two_time_scale.make_two_time_scale_step(
        student_loss,
        fake_loss,
        optimizer,
        optimizer,
        devices.make_mesh(fsdp=1),
        ema_decay=0.9,
        accumulate=1,
        updates=2,
        first=1,
        unroll=False,
    )

    params = {name: toy.params(jax.random.key(i)) for i, name in enumerate(("student", "fake"))}
    create = functools.partial(train_state.create_two, optimizer=optimizer, fake_optimizer=optimizer)
    return toy.run(workdir, steps, step=step, create=lambda mesh: devices.create_sharded(create, mesh, params))


@pytest.mark.slow
def test_a_killed_run_ends_the_same(tmp_path):
    """Killed in its sixth step, it continues from the checkpoint of the fourth: parameters and metrics, bit for bit."""
    with toy.compile_once(tmp_path / "compiled"):
        full = train_toys(tmp_path / "full", 7)
        with killed_at(6):
            train_toys(tmp_path / "killed", 7)
        assert max(map(int, (path.name for path in (tmp_path / "killed/checkpoints").glob("[0-9]*")))) == 4
        resumed = train_toys(tmp_path / "killed", 7)
    jax.tree.map(np.testing.assert_array_equal, toy.leaves(full), toy.leaves(resumed))
    assert any(name.startswith("fake.opt_state") for name in toy.leaves(full))
    assert (tmp_path / "full/metrics.jsonl").read_bytes() == (tmp_path / "killed/metrics.jsonl").read_bytes()


SCRIPT = """
import functools, json
import jax, jax.numpy as jnp
import toy_training as toy
from instaflow_jax.infra import devices
from instaflow_jax.train import loop, state, two_time_scale

def student_loss(params, frozen, batch, key):
    value, metrics = toy.quiet_loss(params, frozen, batch, key)
    return value + jnp.mean((params["up.kernel"] - frozen["fake"]["up.kernel"]) ** 2), metrics

def fake_loss(params, frozen, batch, key):
    other = {"data": frozen["data"] + frozen["student"]["up.kernel"][0, :toy.WIDTH]}
    return toy.quiet_loss(params, other, batch, key)

def advance(mesh, accumulate):
    step = two_time_scale.make_two_time_scale_step(
        student_loss, fake_loss, toy.optimizer(), toy.optimizer(), mesh, ema_decay=0.9, accumulate=accumulate,
        updates=2, first=1, unroll=False)
    create = functools.partial(state.create_two, optimizer=toy.optimizer(), fake_optimizer=toy.optimizer())
    keys = dict(zip(("student", "fake"), jax.random.split(jax.random.key(0))))
    now = devices.create_sharded(lambda keys: create({n: toy.params(k) for n, k in keys.items()}), mesh, keys)
    source, key = toy.source(), devices.replicate_key(jax.random.key(1), mesh)
    frozen = devices.replicate(toy.frozen(), mesh)
    batch = devices.global_batch(next(source), mesh)
    compiled = loop.trace_step(step, now, frozen, batch, key, mesh).lower().compile()
    for _ in range(4):
        now, metrics = compiled(now, frozen, batch, key)
        batch = devices.global_batch(next(source), mesh)
    split = [p.sharding.is_fully_replicated for p in (now.params["up.kernel"], now.fake.params["up.kernel"])]
    moved = {name: value for part in (now.params, now.fake.params) for name, value in part.items()}
    sums = {name: float(jnp.sum(p * jnp.arange(p.size).reshape(p.shape) / p.size)) for name, p in moved.items()}
    return {"metrics": {n: float(v) for n, v in metrics.items()}, "sums": sums, "replicated": split}

one = devices.make_mesh(fsdp=1, devices=jax.devices()[:1])
print(json.dumps([advance(one, 1), advance(devices.make_mesh(fsdp=4), 1), advance(devices.make_mesh(fsdp=2), 2)]))
"""


@pytest.mark.slow
def test_sharded_states_equal_those_of_one_device():
    """Four steps on one device, on FSDP 4, and on FSDP 2 × 2 in two micro-batches."""
    here = Path(__file__).parent
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "PYTHONPATH": f"{here}:{here.parent}"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, cwd=here.parent, check=True, stdout=subprocess.PIPE)
    one, *rest = json.loads(done.stdout.splitlines()[-1])
    assert one["metrics"]["loss"] > 0 and one["metrics"]["fake_loss"] > 0
    for other in rest:
        assert other["replicated"] == [False, False]
        assert other["metrics"] == pytest.approx(one["metrics"], rel=2e-5, abs=1e-7)
        assert other["sums"] == pytest.approx(one["sums"], rel=2e-5, abs=1e-5)


# ---------------------------------------------------------------- the stage


@pytest.fixture(scope="module")
def run(only_training, teacher, tmp_path_factory):
    """A workdir whose flow and score are the teacher seen as a flow; `refine` has to make pairs."""
    workdir = tmp_path_factory.mktemp("run")
    make_flow(teacher, workdir / "reflow")
    make_flow(teacher, workdir / "score")
    main.run(refine_config(teacher), str(workdir))
    return workdir


def make_flow(teacher, directory):
    pipe = load(teacher)
    pipeline.save(flow_training.as_flow(pipe, pipe.params["unet"]), directory / "export")


def unet(folder):
    return UNet2DConditionModel.from_pretrained(folder / "export", "unet")[1]


@pytest.mark.slow
def test_refine_trains_the_student_and_exports_a_flow(run):
    before, after = unet(run / "reflow"), unet(run / "refine")
    assert any(np.any(before[name] != after[name]) for name in before)
    pipe = load(run / "refine/export")
    assert sampling.read_dynamics(pipe.scheduler, pipe.index, "auto") == sampling.Flow(1, 1000)
    rows = [json.loads(line) for line in (run / "refine/metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    assert {"score_gap", "adversarial", "regression", "fake_loss", "fake_accuracy"} <= rows[-1].keys()
    assert [row["loss"] != 0 for row in rows] == [False, True, True, True]  # the student waits for one step


@pytest.mark.slow
def test_a_teacher_is_a_real_score(run, teacher, tmp_path, monkeypatch):
    """Two trained networks, of which one keeps the teacher's head, on the pairs of the flow, which is made first."""
    monkeypatch.setattr(reflow, "run", lambda config, workdir: make_flow(teacher, Path(workdir) / "reflow"))
    config = refine_config(teacher)
    config.update({"real": str(teacher), "alpha": 1.5, "pairs_folder": "refine"})
    config.pairs.update({"model": "", "dynamics": "flow", "alpha": 1.0})
    main.run(config, str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"reflow", "refine"}
    recipe = json.loads((tmp_path / "refine/pairs/manifest.json").read_text())["recipe"]
    assert recipe["solver"] == "euler"
    before, after = unet(run / "reflow"), unet(tmp_path / "refine")
    assert any(np.any(before[name] != after[name]) for name in before)


BAD = [
    ({"t": (0.9, 0.1)}, "config.t=(0.9, 0.1) must be two times, the smaller one first"),
    ({"t": (0.5, 1.0)}, "config.t=(0.5, 1.0) must be from 0 to 0.9999999"),
    ({"N": (1, 0)}, "config.N=(1, 0) must be at least 1"),
    ({"N": ()}, "config.N=() must have at least one value"),
    ({"alpha": -1.0}, "config.alpha=-1.0 must be"),
    ({"regression": 1.0}, "config.regression=1.0 must be from 0 to"),
    ({"fake.updates": 0}, "config.fake.updates=0 must be at least 1"),
    ({"adversarial": 0.0}, "config.adversarial=0 and config.fake.adversarial=0.1 must both be 0"),
    ({"fake.schedule.name": "linear"}, "schedule='linear' is unknown"),
    ({"batch_size": 9}, "batch_size=9 must be from 1 to 8, the number of examples"),
    ({"model": "nowhere"}, "nowhere"),
    ({"score.loss.noise": "old"}, "noise='old' is unknown"),
]


@pytest.mark.parametrize("fields, words", BAD)
def test_what_can_be_refused_is_refused_before_anything_is_made(fields, words, teacher, tmp_path):
    make_flow(teacher, tmp_path / "reflow")
    config = refine_config(teacher)
    config.update_from_flattened_dict(fields)
    with pytest.raises((ValueError, FileNotFoundError)) as refused:
        main.run(config, str(tmp_path))
    assert words in str(refused.value) and "\n" not in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["reflow"]


def test_a_missing_flow_is_checked_before_it_is_made(teacher, tmp_path):
    config = refine_config(teacher)
    config.reflow.model = "nowhere"
    with pytest.raises(FileNotFoundError, match="nowhere"):
        main.run(config, str(tmp_path))
    assert not list(tmp_path.iterdir())
