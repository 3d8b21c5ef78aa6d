"""Every ODE solver as one table of coefficients, and the one integrator that runs them.

A network's output is linear in what a solver works with: D = p x + q out. For a teacher D is its data prediction, for
a flow its velocity. In terms of D every solver here is a linear multistep method, x' = a x + b D + c D_before, so a
solver is a small table of numbers, made in float64 before anything is compiled.
"""

from collections.abc import Callable
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from instaflow_jax import flow
from instaflow_jax.arrays import Latent, Predict
from instaflow_jax.teacher import STEPS_OFFSET, Schedule, alpha_sigma, positive_abar


class Multistep(NamedTuple):
    """A solver's rows, one per network call; each field has shape [N].

    A row means out = network(x, tau), D = p x + q out, x' = a x + b D + c D_before.
    """

    tau: np.ndarray
    p: np.ndarray
    q: np.ndarray
    a: np.ndarray
    b: np.ndarray
    c: np.ndarray


# ---------------------------------------------------------------- the integrator


def integrate(predict: Predict, solver: Multistep, X0: Latent, N: Int[Array, ""] | None = None) -> Latent:
    """Solves the ODE from noise X0 ~ N(0, I) to data.

    Args:
      predict: the network with its text bound and guided (`flow.guided`), `predict(x, tau)`; or a velocity(Z, t) for
        tables in flow time.
      solver: the table. Its fields may be traced arrays.
      N: number of rows to run, for a table that is padded to a fixed length; one compiled program then serves any
        number of steps, but cannot be differentiated backwards. None runs every row.

    Returns:
      X1. The state is kept in float32 or better: in bfloat16 the increments of a step would be lost.
    """
    step, carry, rows = _start(predict, solver, X0)
    if N is None:
        (X1, _), _ = lax.scan(lambda carry, row: (step(carry, row), None), carry, rows)
        return X1
    return lax.fori_loop(0, N, lambda i, carry: step(carry, jax.tree.map(lambda field: field[i], rows)), carry)[0]


def trajectory(
    predict: Predict, solver: Multistep, X0: Latent
) -> tuple[Float[Array, "M B H W C"], Float[Array, "N B H W C"]]:
    """Like `integrate`, but returns all states x_0 .. x_N, [N+1,B,H,W,C], and the D of every row, [N,B,H,W,C]."""
    step, carry, rows = _start(predict, solver, X0)

    def keep(carry, row):
        carry = step(carry, row)
        return carry, carry

    _, (states, D) = lax.scan(keep, carry, rows)
    return jnp.concatenate([carry[0][None], states]), D


def make_step(predict: Predict) -> Callable[[tuple[Latent, Latent], Multistep], tuple[Latent, Latent]]:
    """One row of a table, `step((x, D_before), row) → (x', D)`; see `Multistep`. The first D_before is zero."""

    def step(carry, row):
        x, D_before = carry
        D = row.p * x + row.q * predict(x, row.tau).astype(x.dtype)
        return row.a * x + row.b * D + row.c * D_before, D

    return step


def _start(predict: Predict, solver: Multistep, X0: Latent) -> tuple[Callable, tuple[Latent, Latent], Multistep]:
    """The step, its first argument, and the rows as arrays."""
    X0 = X0.astype(jnp.promote_types(X0.dtype, jnp.float32))
    rows = Multistep(jnp.asarray(solver.tau), *(jnp.asarray(field, X0.dtype) for field in solver[1:]))
    return make_step(predict), (X0, jnp.zeros_like(X0)), rows


# ---------------------------------------------------------------- solvers of flows, in flow time t


def euler(N: int) -> Multistep:
    """N Euler steps Z += v(Z, i/N) / N.

    Raises:
      ValueError: N is not an integer of at least 1.
    """
    t, one = flow_times(N)[:-1], np.ones(N)
    return Multistep(t, 0 * one, one, one, one / N, 0 * one)


def heun(N: int) -> Multistep:
    """N steps of Heun's second-order method, 2N network calls, the last of them at t = 1. Raises as `euler`.

    A flow that was trained only at t < 1 is evaluated at t = 1 here; `euler` never does that.
    """
    t = np.stack([flow_times(N)[:-1], flow_times(N)[1:]], axis=1).ravel()
    predictor, one = np.tile([1.0, 0.0], N), np.ones(2 * N)
    b = (1 + predictor) / (2 * N)  # the predictor goes 1/N along v, the corrector takes half of that back
    return Multistep(t, 0 * one, one, one, b, (predictor - 1) / (2 * N))


def flow_times(N) -> Float[np.ndarray, " M"]:
    """t = 0, 1/N, .. 1, float64 [N+1]. Raises ValueError unless N is an integer of at least 1."""
    if isinstance(N, bool) or not isinstance(N, (int, np.integer)) or N < 1:
        raise ValueError(f"N={N!r} is not a valid number of solver steps; use an integer of at least 1")
    return np.arange(N + 1) / N


def for_flow_network(solver: Multistep, factor: float, num_timesteps: int) -> Multistep:
    """A table in flow time for a bare network: `factor` times its output is X1 − X0, and it takes timesteps."""
    return solver._replace(tau=flow.timestep(solver.tau, num_timesteps), q=factor * solver.q)


# ---------------------------------------------------------------- solvers of teachers


def ddim(schedule: Schedule, N: int) -> Multistep:
    """DDIM without noise (arXiv 2010.02502) in N steps.

    As in diffusers, a step ends T // N below its start, which on a linspace grid is not exactly the next step's start.

    Raises:
      ValueError: N < 1, a grid that exceeds the schedule's T timesteps, or an epsilon network at abar = 0.
    """
    T = len(schedule.abar)
    tau = _grid(schedule, "leading", N, N)
    tau_next = tau - T // N
    last = 1.0 if schedule.set_alpha_to_one else schedule.abar[0]
    abar = schedule.abar[tau]
    abar_next = np.where(tau_next >= 0, schedule.abar[tau_next], last)
    if schedule.prediction_type == "epsilon" and np.any(abar == 0):
        raise ValueError("prediction_type='epsilon' cannot start at abar = 0 (zero terminal SNR); use v_prediction")
    levels = (*alpha_sigma(abar), *alpha_sigma(abar_next))
    return Multistep(tau, *data_coefficients(schedule.prediction_type, *levels[:2]), *ddim_coefficients(*levels))


def dpm_solver(schedule: Schedule, N: int) -> Multistep:
    """DPM-Solver++(2M), midpoint (arXiv 2211.01095), in N steps.

    The first step is first-order, and so is the last if it ends at sigma = 0 or N < 15, as in diffusers.

    Raises:
      ValueError: N < 1, or a grid that exceeds the schedule's T timesteps.
    """
    abar = positive_abar(schedule)
    tau = _grid(schedule, "linspace", N, N + 1)
    last = 1.0 if schedule.final_sigmas_type == "zero" else abar[0]
    levels = (*alpha_sigma(abar[tau]), *alpha_sigma(np.append(abar[tau[1:]], last)))
    rows = dpm_coefficients(*levels, first_order_last=schedule.final_sigmas_type == "zero" or N < 15)
    return Multistep(tau, *data_coefficients(schedule.prediction_type, *levels[:2]), *rows)


FLOW_SOLVERS = MappingProxyType({"euler": euler, "heun": heun})
TEACHER_SOLVERS = MappingProxyType({"dpm_solver": dpm_solver, "ddim": ddim})


def data_coefficients(prediction_type: str, alpha: np.ndarray, sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """p, q of D = p x + q out at each noise level."""
    if prediction_type == "epsilon":
        return 1 / alpha, -sigma / alpha
    if prediction_type == "v_prediction":
        return alpha, -sigma
    return np.zeros_like(alpha), np.ones_like(alpha)


def ddim_coefficients(alpha, sigma, alpha_next, sigma_next) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """a, b, c of x' = alpha' D + sigma' eps, where eps = (x - alpha D) / sigma."""
    a = sigma_next / sigma
    return a, alpha_next - alpha * a, np.zeros_like(a)


def dpm_coefficients(alpha, sigma, alpha_next, sigma_next, first_order_last: bool):
    """a, b, c of DPM-Solver++(2M), where each step starts at the end of the one before it.

    With lambda = log(alpha / sigma) and h its increase over a step, the first-order step is DDIM's, since
    alpha' (1 - exp(-h)) = alpha' - alpha sigma' / sigma. The second-order step replaces D by D + k (D - D_before),
    k = h / (2 h_before). A last step to sigma = 0 has h = inf and must be first-order.
    """
    a, b, _ = ddim_coefficients(alpha, sigma, alpha_next, sigma_next)
    start = np.log(alpha / sigma)
    k = np.zeros_like(a)
    inner = slice(1, len(a) - 1 if first_order_last else None)
    h = np.log(alpha_next[inner] / sigma_next[inner]) - start[inner]
    k[inner] = h / (2 * np.diff(start)[: len(h)])
    return a, b * (1 + k), -b * k


def _grid(schedule: Schedule, default_spacing: str, N, points) -> Int[np.ndarray, " N"]:
    """N falling timesteps: the first N of `points` spread over 0 .. T-1, or N that trail from the end.

    The three spacings are Table 2 of arXiv 2305.08891, rounded as diffusers rounds them. DPM-Solver spreads one point
    more than it visits, so that its last step has the same length as the others.
    """
    T = len(schedule.abar)
    spacing = default_spacing if schedule.timestep_spacing is None else schedule.timestep_spacing
    if isinstance(N, bool) or not isinstance(N, (int, np.integer)) or not 1 <= N <= T:
        raise ValueError(f"N={N!r} is not a valid number of solver steps; use an integer from 1 to {T}")
    if spacing == "linspace":
        tau = np.linspace(0, T - 1, points).round()[::-1]
    elif spacing == "leading":
        tau = np.arange(points)[::-1] * (T // points) + STEPS_OFFSET
    else:
        tau = np.arange(T, 0, -T / N).round() - 1
    tau = tau[:N].astype(np.int32)
    if tau[0] > T - 1 or np.any(np.diff(tau) >= 0):
        grid = f"timestep_spacing={spacing!r} and steps_offset={STEPS_OFFSET}"
        raise ValueError(f"N={N} steps with {grid} do not fit into tau = {T - 1} .. 0; use fewer steps")
    return tau


# ---------------------------------------------------------------- parts of a table


def pad(solver: Multistep, length: int) -> Multistep:
    """The table as float32 with zeros behind its last row, for `integrate` with a number of rows.

    Raises:
      ValueError: the table has more rows than `length`.
    """
    N = len(solver.tau)
    if length < N:
        raise ValueError(f"a solver of {N} steps does not fit into a table of {length}")
    return Multistep(*(np.pad(np.asarray(field, np.float32), (0, length - N)) for field in solver))


def cut(solver: Multistep, k: int, a: float, b: float) -> Multistep:
    """The first k rows, and after them a row of the solver's own tau, p and q that takes x' = a x + b D."""
    rows = Multistep(*(field[: k + 1].copy() for field in solver))
    rows.a[k], rows.b[k], rows.c[k] = a, b, 0.0
    return rows
