"""Consistency: its loss by hand and at its limits, the same on four devices, and the stage when killed."""

import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import distill_config, load, normal, read_config

from instaflow_jax import main
from instaflow_jax.stages.common import flow_training
from instaflow_jax.train import losses

TEXT = types.SimpleNamespace(apply=lambda params, ids: types.SimpleNamespace(last_hidden_state=params[ids]))
FROZEN = {"text_encoder": jnp.asarray(normal(9, 16, 3)), "null_ids": np.array([[0, 0]])}
BATCH = {"X0": normal(0, 64, 4, 4, 2), "X1": normal(1, 64, 4, 4, 2), "ids": np.arange(128).reshape(64, 2) % 15 + 1}
SHARED = {"penalty": "squared", "prompt_dropout": 0.0, "num_timesteps": 1000}


def curved(params, Z, tau, text):
    """A velocity that depends on the point, the time and the prompt."""
    return params * Z + jnp.sin(tau / 300)[:, None, None, None] + text.mean((1, 2))[:, None, None, None]


def make_loss(apply, steps, **changes):
    return losses.make_consistency_loss(types.SimpleNamespace(apply=apply), TEXT, steps=steps, **(SHARED | changes))


# ---------------------------------------------------------------- the loss


def test_the_loss_compares_predictions_at_both_ends_of_a_step_of_the_pairs_line():
    """By hand in float64, at the times that the network saw; the gradient is that of the prediction at t alone."""
    seen, at = [], 0.7

    def record(params, Z, tau, text):
        seen.append((Z, tau))
        return curved(params, Z, tau, text)

    loss = make_loss(record, (1, 2, 3))
    value, metrics = loss(at, FROZEN, BATCH, jax.random.key(3))
    (Z, early), (Z_next, late) = seen
    t, t_next = (1 - np.float64(tau) / 1000 for tau in (early, late))
    N = np.round(1 / (t_next - t))
    assert set(N) == {1, 2, 3}
    np.testing.assert_allclose(t_next - t, 1 / N, atol=1e-6)
    np.testing.assert_allclose(N * t, np.round(N * t), atol=1e-5)

    X0, X1, text = (np.float64(a) for a in (BATCH["X0"], BATCH["X1"], FROZEN["text_encoder"][BATCH["ids"]]))

    def predict(t, Z):
        t, shift = t[:, None, None, None], text.mean((1, 2))[:, None, None, None]
        np.testing.assert_allclose(Z, t * X1 + (1 - t) * X0, atol=1e-5)
        Z = t * X1 + (1 - t) * X0
        return Z + (1 - t) * (at * Z + np.sin((1 - t) / 0.3) + shift), (1 - t) * Z

    (guess, slope), (target, _) = predict(t, Z), predict(t_next, Z_next)
    weight = np.maximum(1, t / (1 - t))[:, None, None, None] ** 2
    assert set(np.round(weight.ravel())) == {1, 4}
    assert float(value) == pytest.approx(np.mean(weight * (guess - target) ** 2), rel=1e-5)
    first = np.mean((guess - target)[t < 0.25] ** 2)
    assert float(metrics["error_t0"]) == pytest.approx(first, rel=1e-5)
    gradient = jax.jit(jax.grad(lambda p: make_loss(curved, (1, 2, 3))(p, FROZEN, BATCH, jax.random.key(3))[0]))(at)
    assert float(gradient) == pytest.approx(np.mean(weight * 2 * (guess - target) * slope), rel=1e-4)


def test_one_step_alone_is_eq_6():
    eq_6 = losses.make_distill_loss(
        types.SimpleNamespace(apply=curved), TEXT, losses.make_latent_distance("squared"), match=0.0, **SHARED
    )
    value, want = (loss(0.7, FROZEN, BATCH, jax.random.key(0))[0] for loss in (make_loss(curved, (1,)), eq_6))
    assert float(value) == pytest.approx(float(want), rel=1e-6) and value > 0.1


def test_one_step_alone_with_another_penalty_is_that_of_the_latents():
    distance = losses.make_latent_distance("pseudo_huber")
    fields = SHARED | {"penalty": "pseudo_huber"}
    eq_6 = losses.make_distill_loss(types.SimpleNamespace(apply=curved), TEXT, distance, match=0.0, **fields)
    alone = make_loss(curved, (1,), penalty="pseudo_huber")
    value, want = (loss(0.7, FROZEN, BATCH, jax.random.key(0))[0] for loss in (alone, eq_6))
    assert float(value) == pytest.approx(float(want), rel=1e-6)
    assert float(value) != pytest.approx(float(make_loss(curved, (1,))(0.7, FROZEN, BATCH, jax.random.key(0))[0]))


def test_it_is_zero_for_the_velocity_of_straight_paths_only():
    loss = make_loss(lambda params, Z, tau, text: BATCH["X1"] - BATCH["X0"] + params, (1, 2, 4, 8))
    assert loss(0.0, FROZEN, BATCH, jax.random.key(0))[0] < 1e-10
    assert loss(0.5, FROZEN, BATCH, jax.random.key(0))[0] > 0.01


def test_every_number_of_steps_and_each_of_its_steps_is_as_likely():
    t, t_next = (np.asarray(times) for times in losses.draw_step(jax.random.key(0), (1, 2, 4), 60_000))
    assert t.min() == 0 and t_next.max() == 1  # exactly: f(X1, 1) is X1
    N = np.round(1 / (t_next - t))
    for steps in (1, 2, 4):
        times, counts = np.unique(t[steps == N], return_counts=True)
        np.testing.assert_array_equal(times, np.arange(steps) / steps)
        np.testing.assert_allclose(counts / 60_000, 1 / (3 * steps), atol=0.01)


def test_no_key_is_used_twice():
    with jax.debug_key_reuse(True):
        jax.jit(make_loss(curved, (1, 2)))(0.7, FROZEN, BATCH, jax.random.key(0))


@pytest.mark.parametrize("steps, N", [((2, 0), 0), ((-1,), -1)])
def test_steps_that_no_sampler_takes_are_refused(steps, N):
    with pytest.raises(ValueError, match=f"N={N} is not a valid number of solver steps; use an integer of at least 1"):
        make_loss(curved, steps)


SCRIPT = """
import json, types
import jax, jax.numpy as jnp
import toy_training as toy
from instaflow_jax.infra import devices
from instaflow_jax.train import loop, losses, state, step

def apply(params, Z, tau, text):
    hidden = jnp.tanh(Z @ params["up.kernel"] + params["up.bias"] + jnp.cos(tau)[:, None, None, None])
    return hidden @ params["down.kernel"] + text.mean()

text = types.SimpleNamespace(apply=lambda params, ids: types.SimpleNamespace(last_hidden_state=params[ids]))
loss = losses.make_consistency_loss(types.SimpleNamespace(apply=apply), text,
    steps=(1, 2, 4), penalty="squared", prompt_dropout=0.1, num_timesteps=1000)
X0, X1 = jax.random.normal(jax.random.key(2), (2, 16, 2, 2, toy.WIDTH))
batch = {"X0": X0, "X1": X1, "ids": jnp.ones((16, 3), jnp.int32)}
frozen = {"text_encoder": jnp.arange(8.0).reshape(2, 4) / 8, "null_ids": jnp.zeros((1, 3), jnp.int32)}

def train(mesh):
    update = step.make_train_step(loss, toy.optimizer(), mesh, ema_decay=0.9, accumulate=1)
    now, key = toy.new_state(mesh), devices.replicate_key(jax.random.key(1), mesh)
    inputs = devices.replicate(frozen, mesh), devices.global_batch(jax.device_get(batch), mesh), key
    compiled = loop.trace_step(update, now, *inputs, mesh).lower().compile()
    for _ in range(3):
        now, metrics = compiled(now, *inputs)
    sums = {name: float(jnp.sum(p * jnp.arange(p.size).reshape(p.shape) / p.size)) for name, p in now.ema.items()}
    split = not now.params["up.kernel"].sharding.is_fully_replicated
    return {"sums": sums, "metrics": {name: float(m) for name, m in metrics.items()}, "split": split}

print(json.dumps([train(devices.make_mesh(fsdp=n, devices=jax.devices()[:n])) for n in (1, 4)]))
"""


@pytest.mark.slow
def test_four_devices_with_a_split_state_train_like_one():
    here = Path(__file__).parent
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "PYTHONPATH": f"{here}:{here.parent}"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, cwd=here.parent, check=True, stdout=subprocess.PIPE)
    one, four = json.loads(done.stdout.splitlines()[-1])
    assert four["split"] and not one["split"] and one["metrics"]["loss"] > 0
    assert four["metrics"] == pytest.approx(one["metrics"], rel=2e-5, abs=1e-7)
    assert four["sums"] == pytest.approx(one["sums"], rel=2e-5, abs=1e-5)


# ---------------------------------------------------------------- the stage


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bits(only_training, teacher, tmp_path):
    run, copy, pipe = tmp_path / "run", tmp_path / "copy", load(teacher)
    flow_training.export(pipe, pipe.params["unet"], run / "reflow" / "export")
    main.run(distill_config(teacher, "consistency"), str(run))
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "consistency" / "checkpoints" / "4")
    shutil.rmtree(copy / "consistency" / "export")
    main.run(distill_config(teacher, "consistency"), str(copy))
    start, once, twice = (
        load(folder / "export").params["unet"] for folder in (run / "reflow", run / "consistency", copy / "consistency")
    )
    assert all(np.array_equal(weight, twice[name]) for name, weight in once.items())
    assert any(np.any(weight != start[name]) for name, weight in once.items())
    rows = [json.loads(line) for line in (copy / "consistency" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "error_t3" in row] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"consistency": (0, 1)}, "config.consistency=(0, 1) must be at least 1"),
        ({"match": 0.5}, "config.consistency=(1, 2, 4, 8) has a loss of its own: use config.match=0 and"),
        ({"distance": "lpips"}, "config.consistency=(1, 2, 4, 8) has a loss of its own: use config.match=0 and"),
    ],
)
def test_wrong_fields_end_in_one_line_before_anything_is_written(fields, words, tmp_path):
    config = read_config("distill", "consistency")
    config.update(fields)
    with pytest.raises(ValueError) as refused:
        main.run(config, str(tmp_path))
    assert str(refused.value).startswith(words) and "\n" not in str(refused.value) and not list(tmp_path.iterdir())
