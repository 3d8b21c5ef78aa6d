"""A noise predictor seen as an ODE: its schedule, DDIM and DPM-Solver++(2M), and its rectified-flow velocity.

A teacher knows x = alpha X1 + sigma eps at integer times tau, alpha^2 = abar, sigma^2 = 1 - abar, noise at large
tau. Whatever its network predicts is linear in the data prediction, D = p x + q out, and in terms of D both solvers
are linear multistep methods, x' = a x + b D + c D_before. A solver is therefore a small table of numbers, made in
float64 before any compile, and one scan serves them all.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from instaflow_jax.arrays import Clock, Latent, Predict, Velocity

# The fields that shape the ODE, with the value diffusers' schedulers take where a file is silent.
# A timestep spacing left out is the solver's own: leading for DDIM, linspace for DPM-Solver++.
DEFAULTS = MappingProxyType(
    {
        "num_train_timesteps": 1000,
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "trained_betas": None,
        "rescale_betas_zero_snr": False,
        "prediction_type": "epsilon",
        "timestep_spacing": None,
        "steps_offset": 0,
        "set_alpha_to_one": True,
        "final_sigmas_type": "zero",
    }
)
# What a file may say. Fields of solvers we lack are here so that a file which asks for them is refused.
SUPPORTED = MappingProxyType(
    {
        "_class_name": ("DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler")
        + ("EulerAncestralDiscreteScheduler", "LMSDiscreteScheduler", "PNDMScheduler"),
        "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
        "prediction_type": ("epsilon", "v_prediction", "sample"),
        "timestep_spacing": ("leading", "trailing", "linspace", None),
        "final_sigmas_type": ("zero", "sigma_min"),
        "algorithm_type": ("dpmsolver++",),
        "solver_order": (2,),
        "solver_type": ("midpoint",),
        "lower_order_final": (True,),
        "timestep_type": ("discrete",),
        "lambda_min_clipped": (-float("inf"),),
        "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
        **dict.fromkeys(["set_alpha_to_one", "rescale_betas_zero_snr"], (True, False)),
        **dict.fromkeys(["clip_sample", "thresholding", "euler_at_final", "use_dynamic_shifting"], (False,)),
        **dict.fromkeys(["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"], (False, None)),
        **dict.fromkeys(["use_lu_lambdas", "use_flow_sigmas"], (False, None)),
    }
)
# Fields that change nothing once those above hold.
INERT = frozenset(["clip_sample_range", "dynamic_thresholding_ratio", "flow_shift", "interpolation_type"]) | frozenset(
    ["sample_max_value", "sigma_max", "sigma_min", "skip_prk_steps", "time_shift_type"]
)


@dataclass(frozen=True, eq=False)
class Schedule:
    """What a teacher was trained on, and how its file wants the time grid laid. See `read_schedule`."""

    abar: np.ndarray  # [T] float64, DDPM's cumulated alpha-bar at tau = 0 .. T-1; falls
    prediction_type: str
    timestep_spacing: str | None
    steps_offset: int
    set_alpha_to_one: bool  # DDIM's last step ends at abar = 1, not at abar[0]
    final_sigmas_type: str  # DPM-Solver's last step ends at sigma = 0 ("zero") or at tau = 0 ("sigma_min")


def read_schedule(config: Mapping[str, Any]) -> Schedule:
    """The schedule a diffusers `scheduler_config.json` (parsed) describes.

    A field left out takes the value diffusers' `from_config` would give the solver, whichever class wrote the
    file. One exception: `clip_sample` left out means no clipping, as latents are never clipped.

    Raises:
      ValueError: an unknown field, or a field whose value is not supported; names field, value and choices.
    """
    silent = set(config["_use_default_values"]) if "_use_default_values" in config else set()
    given = {k: v for k, v in config.items() if k not in silent}
    for field, value in given.items():
        _check_field(field, value)
    if "_class_name" not in given:
        raise ValueError(f"scheduler config has no _class_name; supported: {_list(SUPPORTED['_class_name'])}")
    fields = DEFAULTS | {k: v for k, v in given.items() if k in DEFAULTS}
    names = ("prediction_type", "timestep_spacing", "steps_offset", "set_alpha_to_one", "final_sigmas_type")
    return Schedule(abar=_abar(fields), **{k: fields[k] for k in names})


def _check_field(field, value):
    if field in SUPPORTED:
        if value not in SUPPORTED[field]:
            raise ValueError(
                f"scheduler config: {field}={value!r} is not supported; supported: {_list(SUPPORTED[field])}"
            )
    elif field not in DEFAULTS and field not in INERT and not field.startswith("_"):
        raise ValueError(f"scheduler config: unknown field {field}={value!r}; known: {_list([*DEFAULTS, *SUPPORTED])}")


def _list(values):
    return ", ".join(map(str, values))


def _abar(fields):
    betas = _betas(fields)
    T = fields["num_train_timesteps"]
    if betas.shape != (T,):
        raise ValueError(f"scheduler config: trained_betas has shape {betas.shape}, but num_train_timesteps={T}")
    if not np.all((0 < betas) & (betas < 1)):
        raise ValueError(f"scheduler config: betas run from {betas.min():g} to {betas.max():g}, but must lie in (0, 1)")
    abar = np.cumprod(1 - betas)
    if fields["rescale_betas_zero_snr"]:
        abar = _zero_terminal_snr(abar)
    abar.setflags(write=False)
    return abar


def _betas(fields):
    T, start, end = fields["num_train_timesteps"], fields["beta_start"], fields["beta_end"]
    if fields["trained_betas"] is not None:
        return np.asarray(fields["trained_betas"], np.float64)
    if fields["beta_schedule"] == "linear":
        return np.linspace(start, end, T)
    if fields["beta_schedule"] == "scaled_linear":
        return np.linspace(start**0.5, end**0.5, T) ** 2
    cosine = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - cosine[1:] / cosine[:-1], 0.999)


def _zero_terminal_snr(abar):
    """Shifts and scales sqrt(abar) so that it ends at 0 and starts where it did (arXiv 2305.08891, Algorithm 1)."""
    root = np.sqrt(abar)
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


class Multistep(NamedTuple):
    """N steps of a solver, each field [N]: out = network(x, tau), D = p x + q out, x' = a x + b D + c D_before."""

    tau: np.ndarray
    p: np.ndarray
    q: np.ndarray
    a: np.ndarray
    b: np.ndarray
    c: np.ndarray


def integrate(predict: Predict, solver: Multistep, XT: Latent) -> Latent:
    """Carries noise XT ~ N(0, I) to data along the teacher's ODE: one scan, N network calls.

    `predict(x, tau)` is the network with its text bound and guided (`flow.guided`). The state is kept in float32 or
    better.
    """
    XT = XT.astype(jnp.promote_types(XT.dtype, jnp.float32))
    rows = Multistep(jnp.asarray(solver.tau), *(jnp.asarray(row, XT.dtype) for row in solver[1:]))
    (X1, _), _ = lax.scan(make_step(predict), (XT, jnp.zeros_like(XT)), rows)
    return X1


def make_step(predict: Predict) -> Callable:
    """One step of any solver, `step((x, D_before), row) → ((x', D), None)`, as a scan takes it; `row` is of scalars."""

    def step(carry, row):
        x, D_before = carry
        D = row.p * x + row.q * predict(x, row.tau).astype(x.dtype)
        return (row.a * x + row.b * D + row.c * D_before, D), None

    return step


def ddim(schedule: Schedule, N: int) -> Multistep:
    """DDIM without noise (arXiv 2010.02502) in N steps.

    As in diffusers, a step lands T // N below its start, which on a linspace grid is not quite the next step's start.

    Raises:
      ValueError: N < 1, a grid that leaves the schedule's T steps, or an epsilon network asked at abar = 0.
    """
    T = len(schedule.abar)
    tau = _grid(schedule, "leading", N, N)
    tau_next = tau - T // N
    last = 1.0 if schedule.set_alpha_to_one else schedule.abar[0]
    abar = schedule.abar[tau]
    abar_next = np.where(tau_next >= 0, schedule.abar[tau_next], last)
    if schedule.prediction_type == "epsilon" and np.any(abar == 0):
        raise ValueError("prediction_type='epsilon' cannot start at abar = 0 (zero terminal SNR): use v_prediction")
    levels = (*_alpha_sigma(abar), *_alpha_sigma(abar_next))
    return Multistep(tau, *data_coefficients(schedule.prediction_type, *levels[:2]), *ddim_coefficients(*levels))


def dpm_solver(schedule: Schedule, N: int) -> Multistep:
    """DPM-Solver++(2M), midpoint (arXiv 2211.01095), in N steps.

    The first step is of first order, and so is the last where it ends at sigma = 0 or N < 15, as in diffusers.

    Raises:
      ValueError: N < 1, or a grid that leaves the schedule's T steps.
    """
    abar = _positive(schedule.abar)
    tau = _grid(schedule, "linspace", N, N + 1)
    last = 1.0 if schedule.final_sigmas_type == "zero" else abar[0]
    levels = (*_alpha_sigma(abar[tau]), *_alpha_sigma(np.append(abar[tau[1:]], last)))
    rows = dpm_coefficients(*levels, first_order_last=schedule.final_sigmas_type == "zero" or N < 15)
    return Multistep(tau, *data_coefficients(schedule.prediction_type, *levels[:2]), *rows)


SOLVERS = MappingProxyType({"ddim": ddim, "dpm_solver": dpm_solver})


def data_coefficients(prediction_type: str, alpha: np.ndarray, sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """p, q of D = p x + q out, for each noise level."""
    if prediction_type == "epsilon":
        return 1 / alpha, -sigma / alpha
    if prediction_type == "v_prediction":
        return alpha, -sigma
    return np.zeros_like(alpha), np.ones_like(alpha)


def ddim_coefficients(alpha, sigma, alpha_next, sigma_next) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """a, b, c of x' = alpha' D + sigma' eps, where eps = (x - alpha D) / sigma; every step on its own."""
    a = sigma_next / sigma
    return a, alpha_next - alpha * a, np.zeros_like(a)


def dpm_coefficients(alpha, sigma, alpha_next, sigma_next, first_order_last: bool):
    """a, b, c of DPM-Solver++(2M) on steps that join: each starts where the one before it ends.

    With lambda = log(alpha / sigma) and h its rise over a step, the first-order step is DDIM's, as
    alpha' (1 - exp(-h)) = alpha' - alpha sigma' / sigma. The second-order one puts D + k (D - D_before) for D,
    k = h / (2 h_before). A last step to sigma = 0 has h = inf and must be of first order.
    """
    a, b, _ = ddim_coefficients(alpha, sigma, alpha_next, sigma_next)
    start = np.log(alpha / sigma)
    k = np.zeros_like(a)
    inner = slice(1, len(a) - 1 if first_order_last else None)
    h = np.log(alpha_next[inner] / sigma_next[inner]) - start[inner]
    k[inner] = h / (2 * np.diff(start)[: len(h)])
    return a, b * (1 + k), -b * k


def _alpha_sigma(abar):
    return np.sqrt(abar), np.sqrt(1 - abar)


def _positive(abar):
    """abar where its logarithm is needed: a terminal zero is put at 2^-24, as diffusers' DPM-Solver does."""
    return np.where(abar == 0, 2.0**-24, abar)


def _grid(schedule, default_spacing, N, points):
    """N integer times, falling: the first N of `points` laid over 0 .. T-1, but N where they trail from the end.

    The three spacings are Table 2 of arXiv 2305.08891, rounded as diffusers rounds them. DPM-Solver lays one point
    more than it visits, so that its last step, too, has the length of a step.
    """
    T, offset = len(schedule.abar), schedule.steps_offset
    spacing = default_spacing if schedule.timestep_spacing is None else schedule.timestep_spacing
    if isinstance(N, bool) or not isinstance(N, (int, np.integer)) or not 1 <= N <= T:
        raise ValueError(f"N={N!r} is no number of solver steps: give a whole number from 1 to {T}")
    if spacing == "linspace":
        tau = np.linspace(0, T - 1, points).round()[::-1]
    elif spacing == "leading":
        tau = np.arange(points)[::-1] * (T // points) + offset
    else:
        tau = np.arange(T, 0, -T / N).round() - 1
    tau = tau[:N].astype(np.int32)
    if tau[0] > T - 1 or np.any(np.diff(tau) >= 0):
        grid = f"timestep_spacing={spacing!r} and steps_offset={offset}"
        raise ValueError(f"N={N} steps with {grid} do not fit into tau = {T - 1} .. 0: take fewer steps")
    return tau


def teacher_velocity(predict: Predict, schedule: Schedule) -> Velocity:
    """The teacher's ODE in the clothes of a rectified flow: v(Z, t), t in [0, 1] from noise to data.

    Put Z = x / (alpha + sigma) and t = alpha / (alpha + sigma). Then Z = t X1 + (1 - t) eps, the straight
    interpolation. Along the ODE, d(x / alpha) = eps d(sigma / alpha); with x / alpha = Z / t and
    sigma / alpha = (1 - t) / t that is dZ/dt = (Z - eps) / t = D - eps, the predicted data less the predicted noise.
    In a variance-preserving schedule alpha + sigma = 1 / sqrt(t^2 + (1 - t)^2).

    The network's real-valued tau comes from log-SNR, lambda = log(t / (1 - t)), interpolated in the schedule's own.
    Beyond the schedule's ends the field is that of the end: t is clipped, so it takes Z_0 = XT as the solvers do,
    and a last step from the upper end arrives at D. `predict` must take a float tau.
    """
    alpha, sigma = _alpha_sigma(_positive(schedule.abar))
    ends = (alpha / (alpha + sigma))[[-1, 0]]
    rising, tau_rising = jnp.asarray(np.log(alpha / sigma)[::-1]), jnp.arange(len(alpha), dtype=jnp.float32)[::-1]

    def velocity(Z, t):
        t = jnp.clip(t, *ends)
        norm = jnp.sqrt(t**2 + (1 - t) ** 2)
        alpha, sigma, x = t / norm, (1 - t) / norm, Z / norm
        out = predict(x, jnp.interp(jnp.log(t / (1 - t)), rising, tau_rising))
        return _data_minus_noise(schedule.prediction_type, x, out, alpha, sigma)

    return velocity


def _data_minus_noise(prediction_type, x, out, alpha, sigma):
    if prediction_type == "epsilon":
        return (x - sigma * out) / alpha - out
    if prediction_type == "v_prediction":
        return (alpha * x - sigma * out) - (alpha * out + sigma * x)
    return out - (x - alpha * out) / sigma


def add_noise(schedule: Schedule, X1: Latent, eps: Latent, tau: Clock) -> Latent:
    """x = sqrt(abar) X1 + sqrt(1 - abar) eps at integer times tau [B] in 0 .. T-1 (DDPM's forward process)."""
    alpha, sigma = _levels(schedule, tau)
    return alpha * X1 + sigma * eps


def training_target(schedule: Schedule, X1: Latent, eps: Latent, tau: Clock) -> Latent:
    """What the network is to say at `add_noise(schedule, X1, eps, tau)`: eps, v = alpha eps - sigma X1, or X1."""
    if schedule.prediction_type == "epsilon":
        return eps
    if schedule.prediction_type == "sample":
        return X1
    alpha, sigma = _levels(schedule, tau)
    return alpha * eps - sigma * X1


def _levels(schedule, tau):
    alpha, sigma = (jnp.asarray(level, jnp.float32)[tau] for level in _alpha_sigma(schedule.abar))
    return jax.tree.map(lambda level: level[:, None, None, None], (alpha, sigma))
