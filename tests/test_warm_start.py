"""A teacher's weights as initial weights of a flow: equal noise, the refitted layer, and a smaller error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instaflow_jax import flow, pipeline, sampling, solvers
from instaflow_jax.train import warm_start


@pytest.fixture(scope="module")
def pipe():
    return pipeline.load("openmoji", variant=None, attention="xla")


def encode(pipe, prompts):
    net, params = pipe.nets["text_encoder"], pipe.params["text_encoder"]
    return jax.jit(net.apply)(params, pipe.tokenizer(prompts)).last_hidden_state


@pytest.fixture(scope="module")
def schedule(pipe):
    return sampling.read_dynamics(pipe.scheduler, pipe.index, "auto")


def test_tau_of_equal_noise_inverts_the_schedule(schedule):
    ratio = np.sqrt(schedule.abar / (1 - schedule.abar))
    t = ratio / (1 + ratio)
    np.testing.assert_allclose(warm_start.equal_noise(schedule, t), np.arange(len(t)), atol=1e-6)


def test_tau_is_clipped_to_the_schedule(schedule):
    np.testing.assert_array_equal(
        warm_start.equal_noise(schedule, np.array([1e-6, 1 - 1e-6])), [len(schedule.abar) - 1, 0]
    )


def test_a_layer_refitted_to_the_same_inputs_is_unchanged():
    rng = np.random.default_rng(0)
    sinusoids, kernel = rng.standard_normal((500, 8)), rng.standard_normal((8, 3))
    np.testing.assert_allclose(warm_start.refit(sinusoids, sinusoids, kernel), kernel, rtol=0.05, atol=0.02)


def test_the_refitted_layer_gives_the_old_outputs_for_the_new_inputs():
    rng = np.random.default_rng(1)
    new, mixing, kernel = rng.standard_normal((500, 6)), rng.standard_normal((6, 6)), rng.standard_normal((6, 4))
    old = new @ mixing
    refitted = new @ warm_start.refit(new, old, kernel)
    np.testing.assert_allclose(refitted, old @ kernel, atol=0.05 * np.abs(old @ kernel).max())


@pytest.mark.slow
def test_velocity_at_noise_starts_as_minus_the_noise(pipe, schedule):
    net, params = pipe.nets["unet"], warm_start.from_teacher(pipe.params["unet"], pipe.nets["unet"], schedule, 1000)
    X0 = sampling.noise(np.arange(8), pipe.latent_shape)
    text = encode(pipe, ["red apple"] * 8)
    v = jax.jit(net.apply)(params, X0, flow.timestep(jnp.zeros(8)), text)
    assert float(jnp.mean((v + X0) ** 2)) < 0.05  # the teacher predicts pure noise well


@pytest.mark.slow
def test_the_error_on_the_straight_path_falls(pipe, schedule):
    """On the teacher's own pairs: to below a third for t up to 0.6, and to below 3/4 at t = 0.9."""
    net, count = pipe.nets["unet"], 16
    X0 = sampling.noise(np.arange(count), pipe.latent_shape)
    names = ["red apple", "woman astronaut", "house", "cat face"] * (count // 4)

    text = encode(pipe, names)
    predict = flow.guided(lambda x, tau, c: net.apply(pipe.params["unet"], x, tau, c), text, encode(pipe, [""]), 3.0)
    X1 = jax.jit(lambda X0: solvers.integrate(predict, solvers.dpm_solver(schedule, 10), X0))(X0)

    @jax.jit
    def errors(params):
        def error(t):
            t = jnp.full(count, t)
            v = net.apply(params, flow.interpolate(X0, X1, t), flow.timestep(t), text)
            return jnp.mean((v - flow.velocity_target(X0, X1)) ** 2)

        return jax.lax.map(error, jnp.array([0.1, 0.4, 0.6, 0.9]))

    before = errors(pipe.params["unet"])
    after = errors(warm_start.from_teacher(pipe.params["unet"], net, schedule, 1000))
    assert np.all(np.asarray(after / before) < (1 / 3, 1 / 3, 1 / 3, 3 / 4)), (before, after)
