"""The losses of reflow and distillation: their zeros, their values, and crops as an estimate of complete images."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import normal, relative

from instaflow_jax import flow, teacher
from instaflow_jax.models.lpips import LPIPS
from instaflow_jax.models.vae import AutoencoderKL
from instaflow_jax.train import losses

TEXT = types.SimpleNamespace(
    apply=lambda params, ids: types.SimpleNamespace(last_hidden_state=params[ids])
)  # an embedding table
FROZEN = {"text_encoder": normal(9, 16, 3), "null_ids": np.array([[0, 0]])}
BATCH = {"X0": normal(0, 64, 4, 4, 2), "X1": normal(1, 64, 4, 4, 2), "ids": np.arange(128).reshape(64, 2) % 15 + 1}


def net(function):
    """A network that applies `function(params, Z, tau, text)`."""
    return types.SimpleNamespace(apply=function)


def oracle(params, Z, tau, text):
    """The target of Eq. 5, read from the batch, plus params."""
    return BATCH["X1"] - BATCH["X0"] + params


def reflow(unet, **changes):
    options = {"time": "uniform", "penalty": "squared", "noise": "paired", "prompt_dropout": 0.0} | changes
    return losses.make_reflow_loss(unet, TEXT, num_timesteps=1000, **options)


def distill(unet, *, match, penalty="squared"):
    distance = losses.make_latent_distance(penalty)
    fields = {"match": match, "penalty": penalty, "prompt_dropout": 0.0, "num_timesteps": 1000}
    return losses.make_distill_loss(unet, TEXT, distance, **fields)


def diffusion(unet, prediction_type, **changes):
    options = {"time": "uniform", "penalty": "squared", "noise": "paired", "prompt_dropout": 0.0} | changes
    schedule = teacher.read_schedule(SD | {"prediction_type": prediction_type})
    return losses.make_diffusion_loss(unet, TEXT, schedule, **options)


SD = {"_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_rectified_diffusion_is_the_error_of_the_data_that_diffusers_predicts(prediction_type):
    """Its network sees what diffusers' scheduler adds noise to, with the pair's own noise."""
    import torch
    from diffusers import DDIMScheduler

    seen = {}

    def some(params, x, tau, text):
        seen.update(x=x, tau=tau, text=text)
        return jnp.sin(3 * x)

    value, _ = diffusion(net(some), prediction_type)(0.0, FROZEN, BATCH, jax.random.key(3))
    tau = np.array(seen["tau"])
    assert tau.min() >= 0 and tau.max() < 1000 and tau.std() > 200
    np.testing.assert_array_equal(seen["text"], FROZEN["text_encoder"][BATCH["ids"]])
    scheduler = DDIMScheduler.from_config(SD | {"prediction_type": prediction_type, "clip_sample": False})
    scheduler.set_timesteps(1000)
    X0, X1, x = (torch.tensor(np.array(a, np.float32)) for a in (BATCH["X0"], BATCH["X1"], seen["x"]))
    assert relative(x.numpy(), scheduler.add_noise(X1, X0, torch.tensor(tau)).numpy()) < 1e-5
    guessed = torch.stack([scheduler.step(torch.sin(3 * x[i]), int(t), x[i])[1] for i, t in enumerate(tau)])
    assert float(value) == pytest.approx(float(((guessed - X1) ** 2).mean()), rel=1e-5)


def test_rectified_diffusion_is_zero_where_the_noise_is_known():
    known = diffusion(net(lambda params, x, tau, text: BATCH["X0"] + params), "epsilon", penalty="elementwise_huber")
    assert known(0.0, FROZEN, BATCH, jax.random.key(0))[0] < 1e-5
    assert known(0.5, FROZEN, BATCH, jax.random.key(0))[0] > 0.1


@pytest.mark.parametrize("time", losses.TIMES)
@pytest.mark.parametrize("penalty", losses.PENALTIES)
def test_reflow_is_zero_for_the_true_velocity_only(time, penalty):
    loss = reflow(net(oracle), time=time, penalty=penalty)
    assert loss(0.0, FROZEN, BATCH, jax.random.key(0))[0] == 0
    assert loss(0.5, FROZEN, BATCH, jax.random.key(0))[0] > 0.1
    assert jax.grad(lambda p: loss(p, FROZEN, BATCH, jax.random.key(0))[0])(0.5) > 0


def test_reflow_evaluates_the_network_on_the_straight_path_at_the_flow_timestep():
    seen = {}

    def record(params, Z, tau, text):
        seen.update(Z=Z, tau=tau, text=text)
        return Z

    reflow(net(record))(0.0, FROZEN, BATCH, jax.random.key(3))
    t = 1 - seen["tau"] / 1000
    assert t.min() >= 0 and t.max() < 1 and t.std() > 0.2
    np.testing.assert_allclose(seen["Z"], flow.interpolate(BATCH["X0"], BATCH["X1"], t), atol=1e-5)
    np.testing.assert_array_equal(seen["text"], FROZEN["text_encoder"][BATCH["ids"]])


def test_prompts_are_dropped_at_the_given_rate():
    seen = {}

    def record(params, Z, tau, text):
        seen["text"] = text
        return Z

    big = {name: np.concatenate([rows] * 64) for name, rows in BATCH.items()}
    reflow(net(record), prompt_dropout=0.25)(0.0, FROZEN, big, jax.random.key(0))
    empty = np.all(seen["text"] == FROZEN["text_encoder"][0], axis=(1, 2))
    assert abs(empty.mean() - 0.25) < 0.03


def test_u_shaped_time_has_its_documented_density():
    t = np.asarray(losses.u_shaped(jax.random.key(0), 200_000))
    assert t.min() >= 0 and t.max() <= 1
    seen, edges = np.histogram(t, bins=20, range=(0, 1), density=True)
    u = 2 * (edges[:-1] + edges[1:]) / 2 - 1
    want = np.cosh(4 * u)
    np.testing.assert_allclose(seen, want / want.mean(), rtol=0.06)


def test_pseudo_huber_is_quadratic_for_small_errors_and_linear_for_large_ones():
    d = 32
    error = np.ones((1, 4, 4, 2), np.float32)
    c = 0.00054 * d
    small, large = c * 1e-2 / d**0.5, 1e3
    values = [float(losses.pseudo_huber(s * error)[0]) for s in (small, 2 * small, large, 2 * large)]
    assert values[1] / values[0] == pytest.approx(4, rel=1e-2)
    assert values[3] / values[2] == pytest.approx(2, rel=1e-3)


def test_buckets_average_the_error_in_each_quarter_of_t():
    t = jnp.array([0.1, 0.2, 0.3, 0.6, 0.9, 1.0 - 1e-7])
    error = jnp.array([1.0, 3.0, 5.0, 7.0, 9.0, 11.0])
    assert losses.buckets(t, error) == {"error_t0": 2.0, "error_t1": 5.0, "error_t2": 7.0, "error_t3": 10.0}


def test_distillation_by_l2_is_eq_6():
    loss = distill(net(lambda p, Z, tau, text: p * Z), match=0.0)
    value, metrics = loss(0.3, FROZEN, BATCH, jax.random.key(0))
    np.testing.assert_allclose(value, np.mean((1.3 * BATCH["X0"] - BATCH["X1"]) ** 2), rtol=1e-6)
    assert metrics == {"l2": value}


def test_the_penalty_is_of_the_latents_and_of_the_velocities_that_match():
    loss = distill(net(lambda params, Z, tau, text: params + 0 * Z), match=0.25, penalty="pseudo_huber")
    value, metrics = loss(0.3, FROZEN, BATCH, jax.random.key(0))
    error = BATCH["X0"] + 0.3 - BATCH["X1"]
    norm, c = np.sqrt((error**2).sum((1, 2, 3))), 0.00054 * 32
    each = (np.sqrt(norm**2 + c**2) - c) / 32**0.5
    np.testing.assert_allclose(value, each.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["matching"], each[::4].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["l2"], (error**2)[np.arange(64) % 4 > 0].mean(), rtol=1e-5)


def test_distillation_uses_t_zero_except_for_the_share_that_matches():
    seen = {}

    def record(params, Z, tau, text):
        seen["tau"] = tau
        return Z

    loss = distill(net(record), match=0.25)
    value, metrics = loss(0.0, FROZEN, BATCH, jax.random.key(0))
    tau = np.reshape(seen["tau"], (16, 4))
    assert np.all(tau[:, 0] < 1000) and np.all(tau[:, 1:] == 1000)
    np.testing.assert_allclose(value, 0.75 * metrics["l2"] + 0.25 * metrics["matching"], rtol=1e-6)
    loss = distill(net(oracle), match=0.25)
    assert float(loss(0.0, FROZEN, BATCH, jax.random.key(0))[0]) < 1e-12


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: reflow(net(oracle), time="never"), "time='never' is unknown: use one of uniform, u_shaped"),
        (lambda: losses.make_latent_distance("hard"), "penalty='hard' is unknown: use one of squared, pseudo_huber"),
        (lambda: reflow(net(oracle), penalty="hard"), "penalty='hard' is unknown: use one of squared, pseudo_huber"),
        (
            lambda: distill(net(oracle), match=1.0),
            "match=1.0 must be a share in",
        ),
        (lambda: losses.random_crop(jax.random.key(0), jnp.zeros((1, 8, 8, 4)), 9), "does not fit into 8×8"),
    ],
)
def test_bad_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        make()


# ---------------------------------------------------------------- LPIPS


@pytest.fixture(scope="module")
def networks():
    """A random decoder (factor 2), a random LPIPS, and `frozen` with their parameters."""
    vae = AutoencoderKL.from_config(
        {
            "block_out_channels": (8, 8),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "norm_num_groups": 4,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
        }
    )
    lpips = LPIPS.from_config({"widths": (8, 8), "depths": (1, 1)})
    frozen = FROZEN | {"vae": vae.init(jax.random.key(0)), "lpips": lpips.init(jax.random.key(1))}
    return vae, lpips, frozen


def pair(count, side):
    return {"X1": normal(1, count, side, side, 4)}, normal(1, count, side, side, 4) + 0.3 * normal(
        2, count, side, side, 4
    )


@pytest.mark.slow
def test_lpips_distance_decodes_both_and_adds_l2(networks):
    vae, lpips, frozen = networks
    batch, X1_hat = pair(4, 8)
    distance = losses.make_lpips_distance(vae, lpips, l2=0.5, crop=0, margin=0)
    value, metrics = jax.jit(distance)(frozen, X1_hat, batch, jax.random.key(0))
    images = [jax.jit(lambda p, z: vae.apply(p, z, method="decode"))(frozen["vae"], z) for z in (X1_hat, batch["X1"])]
    want = jnp.mean(lpips.apply(frozen["lpips"], *images))
    np.testing.assert_allclose(metrics["lpips"], want, rtol=1e-5)
    np.testing.assert_allclose(value, want + 0.5 * np.mean((X1_hat - batch["X1"]) ** 2), rtol=1e-5)
    assert (
        losses.make_lpips_distance(vae, lpips, l2=0, crop=0, margin=0)(frozen, batch["X1"], batch, jax.random.key(0))[0]
        < 1e-12
    )


@pytest.mark.slow
def test_a_cached_target_equals_one_decoded_in_the_step(networks):
    vae, lpips, frozen = networks
    batch, X1_hat = pair(4, 8)
    target = vae.apply(frozen["vae"], batch["X1"], method="decode")
    span = float(np.abs(target).max())  # bytes cover [−1, 1], which a random decoder exceeds
    frozen = frozen | {
        "vae": frozen["vae"]
        | {f"decoder.conv_out.{word}": frozen["vae"][f"decoder.conv_out.{word}"] / span for word in ("kernel", "bias")}
    }
    target = np.asarray(jnp.round((vae.apply(frozen["vae"], batch["X1"], method="decode") + 1) * 127.5), np.uint8)
    distance = jax.jit(losses.make_lpips_distance(vae, lpips, l2=0, crop=0, margin=0))
    fly = distance(frozen, X1_hat, batch, jax.random.key(0))[0]
    cached = distance(frozen, X1_hat, batch | {"target": target}, jax.random.key(0))[0]
    np.testing.assert_allclose(cached, fly, rtol=0.02)


@pytest.mark.slow
def test_random_crops_estimate_the_distance_of_complete_images(networks):
    """Within 10 % for 16×16 latents, crops of 8 and a margin of 2; the decoder's norm and attention see less."""
    vae, lpips, frozen = networks
    batch, X1_hat = pair(96, 16)
    full = jax.jit(losses.make_lpips_distance(vae, lpips, l2=0, crop=0, margin=0))
    crops = jax.jit(losses.make_lpips_distance(vae, lpips, l2=0, crop=8, margin=2))
    want = float(full(frozen, X1_hat, batch, jax.random.key(0))[0])
    got = np.mean([float(crops(frozen, X1_hat, batch, jax.random.key(i))[0]) for i in range(4)])
    assert relative(np.array([got]), np.array([want])) < 0.1
    gradients = [jax.grad(lambda z, d=d: d(frozen, z, batch, jax.random.key(0))[0])(X1_hat) for d in (full, crops)]
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in gradients)


def test_random_crops_are_equal_within_a_pair_and_reach_every_corner():
    z = jnp.broadcast_to(jnp.arange(16.0).reshape(1, 4, 4, 1), (256, 4, 4, 1))
    pieces = losses.random_crop(jax.random.key(0), jnp.concatenate([z, z], axis=-1), 3)
    np.testing.assert_array_equal(pieces[..., 0], pieces[..., 1])
    assert set(np.unique(pieces[:, 0, 0, 0])) == {0.0, 1.0, 4.0, 5.0}
