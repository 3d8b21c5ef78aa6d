"""The flow's mathematics and its solvers: their properties, and the released sampling loop restated in PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers import unchecked

from instaflow_jax import flow, solvers

B, H, W, C, L, D = 3, 4, 2, 4, 5, 6
random = np.random.default_rng(0)
MIX, TIME, TEXT = (0.5 * random.standard_normal(s) for s in ((C, C), (8, C), (D, C)))


def normal(*shape, seed=1):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def twin(xp, as_array):
    """One small nonlinear network of latents, timestep and text, in jax.numpy or in torch."""
    mix, time, words, frequency = (as_array(w.astype(np.float32)) for w in (MIX, TIME, TEXT, 0.03 ** np.arange(8)))

    def network(Z, tau, context):
        temporal = xp.cos(tau[:, None] * frequency) @ time
        return Z @ mix + 2 * xp.tanh(Z + (temporal + context.mean(1) @ words)[:, None, None])

    return network


jax_network, torch_network = twin(jnp, jnp.asarray), twin(torch, torch.from_numpy)


def released_loop(X0, text, null, N, alpha):
    """The released sampler: real-valued timesteps from 1000, doubled batch [null, text] only if guided, Euler."""
    latents, guiding = X0, alpha > 1.0
    context = torch.cat([null, text]) if guiding else text
    for tau in [1000.0 * (1 - i / N) for i in range(N)]:
        batch = torch.cat([latents] * 2) if guiding else latents
        v = torch_network(batch, torch.full((len(batch),), tau), context)
        if guiding:
            v_null, v_text = v.chunk(2)
            v = v_null + alpha * (v_text - v_null)
        latents = latents + v / N
    return latents.numpy()


def relative(got, want):
    return np.linalg.norm(np.asarray(got) - want) / np.linalg.norm(want)


def euler(velocity, X0, N):
    return solvers.integrate(velocity, solvers.euler(N), jnp.asarray(X0))


def heun(velocity, X0, N):
    return solvers.integrate(velocity, solvers.heun(N), jnp.asarray(X0))


def straightness(velocity, X0, N):
    return flow.straightness(solvers.trajectory(velocity, solvers.euler(N), jnp.asarray(X0))[1])


def rotation(omega):
    """Turns the channel pairs (0, 1) and (2, 3) by omega from t = 0 to 1: no expansion, constant speed."""
    return lambda Z, t: omega * jnp.stack([-Z[..., 1], Z[..., 0], -Z[..., 3], Z[..., 2]], -1)


def gaussian(mean, std):
    """The exact rectified flow from N(0, 1) to N(mean, std^2), each dimension alone."""

    def velocity(Z, t):
        variance = (t * std) ** 2 + (1 - t) ** 2
        return mean + (t * std**2 - (1 - t)) / variance * (Z - t * mean)

    return velocity


@pytest.mark.parametrize("alpha", [1.0, 1.5])
@pytest.mark.parametrize("N", [1, 2, 25])
def test_sampling_equals_the_released_loop(N, alpha):
    X0, text, negative = normal(B, H, W, C), normal(B, L, D, seed=2), normal(B, L, D, seed=3)
    got = euler(flow.flow_velocity(jax_network, text, negative, alpha), X0, N)
    want = released_loop(*map(torch.from_numpy, (X0, text, negative)), N, alpha)
    assert relative(got, want) < 1e-5


def test_timesteps_fall_from_1000_at_noise_and_stay_within_float32_rounding():
    def asks(Z, t):
        return jnp.broadcast_to(flow.timestep(t), Z.shape)

    _, v = jax.jit(lambda X0: solvers.trajectory(asks, solvers.euler(25), X0))(normal(1, 1, 1, 1))
    tau = np.asarray(v).ravel()
    assert tau[0] == 1000
    np.testing.assert_allclose(tau, np.arange(1000, 0, -40), rtol=0, atol=3.1e-5)  # half a float32 step at 1000
    assert flow.timestep(jnp.float32(0.5), num_timesteps=10) == 5


def test_the_path_runs_from_noise_to_data_at_the_target_velocity():
    X0, X1, t = normal(B, H, W, C), normal(B, H, W, C, seed=2), jnp.array([0.0, 0.25, 1.0])
    Xt = flow.interpolate(X0, X1, t)
    np.testing.assert_array_equal(Xt[0], X0[0])
    np.testing.assert_allclose(Xt[1], 0.75 * X0[1] + 0.25 * X1[1], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(Xt[2], X1[2])
    _, slope = jax.jvp(lambda t: flow.interpolate(X0, X1, t), (t,), (jnp.ones(B),))
    np.testing.assert_allclose(slope, flow.velocity_target(X0, X1), rtol=1e-6)


def test_guidance_is_linear_and_alpha_one_is_the_text_branch():
    v_text, v_null = normal(B, H, W, C), normal(B, H, W, C, seed=2)
    np.testing.assert_array_equal(flow.guide(v_text, v_null, 1.0), v_text)
    np.testing.assert_allclose(flow.guide(v_text, v_null, 3.0), v_null + 3 * (v_text - v_null), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("alpha", "batch"), [(0.0, B), (1.0, B), (1.5, 2 * B)])
def test_only_alpha_above_one_doubles_the_batch(alpha, batch):
    asked = []

    def network(Z, tau, context):
        asked.append((Z.shape[0], tau, context))
        return jax_network(Z, tau, context)

    Z, text, null = normal(B, H, W, C), normal(B, L, D, seed=2), normal(1, L, D, seed=3)
    out = flow.guided(network, text, null, alpha)(Z, 500.0)
    (got_batch, tau, context), *more = asked
    assert not more
    assert got_batch == batch
    np.testing.assert_array_equal(tau, np.full(batch, 500.0))
    if alpha > 1:
        np.testing.assert_array_equal(context[::2], np.repeat(null, B, 0))
        np.testing.assert_array_equal(context[1::2], text)
    else:
        np.testing.assert_array_equal(context, text)
        np.testing.assert_array_equal(out, jax_network(Z, tau, text))


def test_guidance_with_the_prompt_as_its_own_negative_changes_nothing():
    Z, text = normal(B, H, W, C), normal(B, L, D, seed=2)
    plain, guided = (flow.guided(jax_network, text, text, alpha)(Z, 500.0) for alpha in (1.0, 4.0))
    np.testing.assert_allclose(guided, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("N", [1, 2, 7, 25])
def test_a_straight_flow_is_exact_in_any_number_of_steps_and_has_no_s(N):
    X0, X1 = normal(B, H, W, C), 3 * normal(B, H, W, C, seed=2)

    def straight(Z, t):
        return X1 - X0

    np.testing.assert_allclose(euler(straight, X0, N), X1, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(heun(straight, X0, N), X1, rtol=1e-5, atol=1e-5)
    assert np.all(straightness(straight, X0, N) < 1e-10)


def test_a_flow_whose_samples_walk_straight_lines_at_constant_speed_has_no_s():
    def scaling(Z, t):  # Z_t = (1 + 2 t) Z_0: the field bends in space and time, the paths do not
        return 2 * Z / (1 + 2 * t)

    assert np.all(straightness(scaling, normal(B, H, W, C), 50) < 1e-10)


def test_s_of_a_rotation_is_its_chord_against_its_arc():
    X0, omega = normal(B, H, W, C), 1.0
    S = straightness(rotation(omega), X0, 1000)
    exact = (omega**2 - 4 * np.sin(omega / 2) ** 2) * (X0**2).mean((1, 2, 3))
    assert S.shape == (B,)
    np.testing.assert_allclose(S, exact, rtol=0.01)


def test_s_of_an_uneven_speed_on_a_straight_line_counts():
    X0 = normal(B, H, W, C)
    S = straightness(lambda Z, t: 2 * t * jnp.ones_like(Z), X0, 1000)
    np.testing.assert_allclose(S, np.full(B, 1 / 3), rtol=0.01)  # integral of (1 - 2 t)^2


def test_s_of_a_gaussian_flow_is_the_variance_of_its_rate_of_spread():
    X0, std = normal(B, H, W, C), 0.3
    t = np.linspace(0, 1, 100_001)
    rate = (t * std**2 - (1 - t)) / np.sqrt((t * std) ** 2 + (1 - t) ** 2)
    exact = (np.mean(rate**2) - (std - 1) ** 2) * (X0**2).mean((1, 2, 3))
    np.testing.assert_allclose(straightness(gaussian(2.0, std), X0, 2000), exact, rtol=0.01)


@pytest.mark.parametrize(("solver", "order"), [(euler, 1), (heun, 2)])
def test_solver_orders_on_a_gaussian_flow(solver, order):
    X0 = normal(B, H, W, C)
    errors = [relative(solver(gaussian(1.0, 0.5), X0, N), 1 + 0.5 * X0) for N in (16, 32, 64)]
    ratios = np.divide(errors[:-1], errors[1:])
    np.testing.assert_allclose(ratios, 2.0**order, rtol=0.15)


def test_the_trajectory_holds_the_states_of_euler():
    X0 = normal(B, H, W, C)
    Z, v = solvers.trajectory(rotation(2.0), solvers.euler(5), X0)
    assert Z.shape == (6, B, H, W, C)
    np.testing.assert_array_equal(Z[0], X0)
    np.testing.assert_array_equal(Z[-1], euler(rotation(2.0), X0, 5))
    np.testing.assert_allclose(Z[1:] - Z[:-1], v / 5, atol=1e-6)


@pytest.mark.parametrize("N", [1, 2, 7])
def test_one_program_serves_every_number_of_steps(N):
    X0, text = normal(B, H, W, C), normal(B, L, D)
    velocity = flow.flow_velocity(jax_network, jnp.asarray(text), jnp.asarray(text), 1.0)
    padded = jax.jit(lambda table, X0, N: solvers.integrate(velocity, table, X0, N))
    assert relative(padded(solvers.pad(solvers.euler(N), 9), X0, N), np.asarray(euler(velocity, X0, N))) < 1e-6


@pytest.mark.parametrize("solver", [solvers.euler, solvers.heun])
def test_a_table_for_the_bare_network_equals_the_one_in_flow_time(solver):
    """A network of the other sign and half the timesteps, as some directories have it."""
    X0, text = normal(B, H, W, C), normal(B, L, D, seed=2)
    network = flow.guided(lambda Z, tau, context: -jax_network(Z, 2 * tau, context), text, text, 1.0)
    got = solvers.integrate(network, solvers.for_flow_network(solver(4), -1.0, 500), X0)
    want = solvers.integrate(flow.flow_velocity(jax_network, text, text, 1.0), solver(4), X0)
    assert relative(got, np.asarray(want)) < 1e-6


def test_a_padded_table_that_is_too_short_is_refused():
    with pytest.raises(ValueError, match="a solver of 5 steps does not fit into a table of 4"):
        solvers.pad(solvers.euler(5), 4)


def test_a_bfloat16_network_does_not_make_a_bfloat16_state():
    X0 = jnp.ones((1, 1, 1, 1), jnp.bfloat16)
    for solver in (euler, heun):
        X1 = solver(lambda Z, t: jnp.ones(Z.shape, jnp.bfloat16), X0, 1000)
        assert X1.dtype == jnp.float32
        np.testing.assert_allclose(X1, 2.0, rtol=1e-4)  # a bfloat16 sum of 0.001s would stay at 1


@pytest.mark.parametrize("N", [0, -1, 2.0, True, None])
@pytest.mark.parametrize("solver", solvers.FLOW_SOLVERS.values())
def test_an_invalid_number_of_steps_is_refused(solver, N):
    with pytest.raises(
        ValueError, match=f"N={N!r} is not a valid number of solver steps; use an integer of at least 1"
    ):
        unchecked(solver)(N)
