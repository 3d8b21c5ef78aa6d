"""A noise predictor seen as an ODE: its noise schedule, and its rectified-flow velocity.

A teacher knows x = alpha X1 + sigma eps at integer timesteps tau, with alpha^2 = abar and sigma^2 = 1 - abar; large tau
is noise. `solvers` integrates it.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from instaflow_jax.arrays import Latent, PerSample, Predict, Scalar, Timestep, Velocity, VelocityAt

# The fields that shape the ODE, with the value that diffusers' schedulers use for a field missing from the file.
# A missing timestep spacing means the solver's own: leading for DDIM, linspace for DPM-Solver++.
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
        "set_alpha_to_one": True,
        "final_sigmas_type": "zero",
    }
)
# Those that decide abar.
NOISE_FIELDS = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule"),
    *("trained_betas", "rescale_betas_zero_snr"),
)
# The values a file may have. Fields of solvers that are not here are listed so that a file with them is refused.
SUPPORTED = MappingProxyType(
    {
        "_class_name": (
            *("DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"),
            *("EulerAncestralDiscreteScheduler", "LMSDiscreteScheduler", "PNDMScheduler"),
        ),
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
        **dict.fromkeys(["clip_sample", "predict_epsilon"], (True, False)),
        **dict.fromkeys(["thresholding", "euler_at_final", "use_dynamic_shifting"], (False,)),
        "timestep_values": (None,),
        **dict.fromkeys(["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"], (False, None)),
        **dict.fromkeys(["use_lu_lambdas", "use_flow_sigmas"], (False, None)),
    }
)
# Fields that have no effect under the values above.
INERT = frozenset(["clip_sample_range", "dynamic_thresholding_ratio", "flow_shift", "interpolation_type"]) | frozenset(
    ["sample_max_value", "sigma_max", "sigma_min", "skip_prk_steps", "tensor_format", "time_shift_type"]
)
STEPS_OFFSET = 1  # added to every timestep of a leading grid
# The values that diffusers' StableDiffusionPipeline gives every scheduler, whatever its file says.
PIPELINE = MappingProxyType({"steps_offset": STEPS_OFFSET, "clip_sample": False})


@dataclass(frozen=True, eq=False)
class Schedule:
    """A teacher's noise schedule, and the time grid that its file asks for; see `read_schedule`."""

    abar: np.ndarray  # [T] float64, DDPM's cumulative product at tau = 0 .. T-1; decreases
    prediction_type: str
    timestep_spacing: str | None
    set_alpha_to_one: bool  # DDIM's last step ends at abar = 1, not at abar[0]
    final_sigmas_type: str  # DPM-Solver's last step ends at sigma = 0 ("zero") or at tau = 0 ("sigma_min")


def read_schedule(config: Mapping[str, Any]) -> Schedule:
    """The schedule that a diffusers `scheduler_config.json` (parsed) describes.

    A missing field gets the value that diffusers' `from_config` would give the solver, whichever class wrote the file.
    Two fields are always as diffusers' StableDiffusionPipeline sets them: `steps_offset` is 1, and latents are not
    clipped. A file that says otherwise gets a warning. `predict_epsilon` is the name of 2022 for `prediction_type`.

    Raises:
      ValueError: an unknown field or an unsupported value; names the field, the value and the choices.
    """
    unset = set(config["_use_default_values"]) if "_use_default_values" in config else set()
    given = {k: v for k, v in config.items() if k not in unset}
    for field, value in given.items():
        _check_field(field, value)
    if "_class_name" not in given:
        raise ValueError(f"scheduler config has no _class_name; supported: {_list(SUPPORTED['_class_name'])}")
    for field, value in PIPELINE.items():
        if given.get(field, value) != value:
            warnings.warn(
                f"scheduler config: {field}={given[field]!r} is read as {value!r}, as in diffusers' "
                f"StableDiffusionPipeline; set {field} to {str(value).lower()} in scheduler_config.json",
                stacklevel=2,
            )
    if given.get("predict_epsilon") is False:
        given.setdefault("prediction_type", "sample")
    fields = DEFAULTS | {k: v for k, v in given.items() if k in DEFAULTS}
    names = ("prediction_type", "timestep_spacing", "set_alpha_to_one", "final_sigmas_type")
    return Schedule(abar=_abar(fields), **{k: fields[k] for k in names})


def _check_field(field, value):
    if field in SUPPORTED:
        if value not in SUPPORTED[field]:
            raise ValueError(
                f"scheduler config: {field}={value!r} is not supported; supported: {_list(SUPPORTED[field])}"
            )
    elif field not in DEFAULTS | PIPELINE and field not in INERT and not field.startswith("_"):
        raise ValueError(f"scheduler config: unknown field {field}={value!r}; known: {_list([*DEFAULTS, *SUPPORTED])}")


def _list(values):
    return ", ".join(map(str, values))


def _abar(fields):
    betas = _betas(fields)
    T = fields["num_train_timesteps"]
    if betas.shape != (T,):
        raise ValueError(f"scheduler config: trained_betas has shape {betas.shape}, but num_train_timesteps={T}")
    if not np.all((betas > 0) & (betas < 1)):
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


def alpha_sigma(abar: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """alpha = √abar and sigma = √(1 − abar)."""
    return np.sqrt(abar), np.sqrt(1 - abar)


def positive_abar(schedule: Schedule) -> np.ndarray:
    """abar where its logarithm is needed: a terminal zero becomes 2^-24, as in diffusers' DPM-Solver."""
    return np.where(schedule.abar == 0, 2.0**-24, schedule.abar)


def teacher_velocity(predict: Predict, schedule: Schedule) -> Velocity:
    """The teacher's ODE as a rectified flow: its velocity v(Z, t), t in [0, 1] from noise to data.

    Let Z = x / (alpha + sigma) and t = alpha / (alpha + sigma). Then Z = t X1 + (1 - t) eps, the straight
    interpolation. Along the ODE, d(x / alpha) = eps d(sigma / alpha); with x / alpha = Z / t and
    sigma / alpha = (1 - t) / t that is dZ/dt = (Z - eps) / t = D - eps, the predicted data less the predicted noise.
    In a variance-preserving schedule alpha + sigma = 1 / sqrt(t^2 + (1 - t)^2).

    The network's real-valued tau is found by interpolating lambda = log(t / (1 - t)) in the schedule's own lambda.
    Beyond the schedule's ends the velocity is the one at the end: t is clipped. So Z_0 = XT is a valid start, as it is
    for the solvers, and a last step from the upper end lands on D. `predict` must accept a float tau.
    """
    velocity_at, tau_at, ends = make_velocity_at(predict, schedule), make_tau_at(schedule), flow_ends(schedule)

    def velocity(Z, t):
        t = jnp.clip(t, *ends)
        return velocity_at(Z, t, tau_at(t))

    return velocity


def make_tau_at(schedule: Schedule) -> Callable[[PerSample], Timestep]:
    """`tau_at(t)`: the real-valued tau of flow time t inside of `flow_ends`, in float32; see `teacher_velocity`."""
    alpha, sigma = alpha_sigma(positive_abar(schedule))
    rising, tau_rising = jnp.asarray(np.log(alpha / sigma)[::-1]), jnp.arange(len(alpha), dtype=jnp.float32)[::-1]
    return lambda t: jnp.interp(jnp.log(t / (1 - t)), rising, tau_rising)


def make_velocity_at(predict: Predict, schedule: Schedule) -> VelocityAt:
    """`teacher_velocity` as `velocity_at(Z, t, tau)`, for a grid whose tau are known from `equal_noise` in float64.

    In float32, t alone gives tau to about 1e-4. t and tau are both scalars, or both [B].
    """
    ends = flow_ends(schedule)

    def velocity_at(Z, t, tau):
        t = jnp.clip(t, *ends)
        x = network_input(Z, t)
        return output_velocity(schedule, predict(x, tau), x, t)

    return velocity_at


def network_input(Z: Latent, t: PerSample | Scalar) -> Latent:
    """The teacher's x = alpha X1 + sigma eps at Z = t X1 + (1 − t) eps, for t inside of `flow_ends`."""
    return Z / _flow_levels(t)[2]


def output_velocity(schedule: Schedule, out: Latent, x: Latent, t: PerSample | Scalar) -> Latent:
    """The velocity, predicted data less predicted noise, that the network's output at `network_input` means."""
    alpha, sigma, _ = _flow_levels(t)
    if schedule.prediction_type == "epsilon":
        return (x - sigma * out) / alpha - out
    if schedule.prediction_type == "v_prediction":
        return (alpha * x - sigma * out) - (alpha * out + sigma * x)
    return out - (x - alpha * out) / sigma


def output_weight(schedule: Schedule, t: PerSample) -> PerSample:
    """What makes the squared error of `output_velocity` that of the network's own output: 1 / (dv / dout)²."""
    if schedule.prediction_type == "epsilon":
        return t**2
    if schedule.prediction_type == "v_prediction":
        return t**2 + (1 - t) ** 2
    return (1 - t) ** 2


def _flow_levels(t):
    t = jnp.reshape(t, (-1, 1, 1, 1))
    norm = jnp.sqrt(t**2 + (1 - t) ** 2)
    return t / norm, (1 - t) / norm, norm


def flow_ends(schedule: Schedule) -> Float[np.ndarray, "2"]:
    """The flow times of the schedule's noisiest and cleanest level, tau = T − 1 and tau = 0."""
    return flow_times(schedule)[[-1, 0]]


def flow_times(schedule: Schedule) -> Float[np.ndarray, " T"]:
    """The flow time t = alpha / (alpha + sigma) of each tau = 0 .. T − 1."""
    alpha, sigma = alpha_sigma(positive_abar(schedule))
    return alpha / (alpha + sigma)


def equal_noise(schedule: Schedule, t: Float[np.ndarray, " T"]) -> Float[np.ndarray, " T"]:
    """The real-valued tau at which the teacher's alpha / sigma is t / (1 − t), clipped to the range of the schedule."""
    abar = positive_abar(schedule)
    with np.errstate(divide="ignore"):  # t = 0 and t = 1 lie beyond the schedule's ends
        log_ratio = np.log(t / (1 - t))
    return np.interp(log_ratio, np.log(abar / (1 - abar))[::-1] / 2, np.arange(len(abar))[::-1])


def add_noise(schedule: Schedule, X1: Latent, eps: Latent, tau: Timestep) -> Latent:
    """x = sqrt(abar) X1 + sqrt(1 - abar) eps at integer timesteps tau [B] in 0 .. T-1 (DDPM's forward process)."""
    alpha, sigma = _levels(schedule, tau)
    return alpha * X1 + sigma * eps


def training_target(schedule: Schedule, X1: Latent, eps: Latent, tau: Timestep) -> Latent:
    """The network's target at `add_noise(schedule, X1, eps, tau)`: eps, v = alpha eps - sigma X1, or X1."""
    if schedule.prediction_type == "epsilon":
        return eps
    if schedule.prediction_type == "sample":
        return X1
    alpha, sigma = _levels(schedule, tau)
    return alpha * eps - sigma * X1


def _levels(schedule, tau):
    alpha, sigma = (jnp.asarray(level, jnp.float32)[tau] for level in alpha_sigma(schedule.abar))
    return jax.tree.map(lambda level: level[:, None, None, None], (alpha, sigma))
