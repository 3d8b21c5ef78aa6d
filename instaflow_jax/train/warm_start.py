"""A noise predictor's weights made ready to become a flow's: the same knowledge, asked by the other clock."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from instaflow_jax.arrays import Params
from instaflow_jax.models.unet import timestep_embedding
from instaflow_jax.teacher import Schedule

_RIDGE = 1e-2  # keeps the refitted layer no larger than the one it replaces
_CLOCK_LAYER = "time_embedding.linear_1.kernel"


def from_teacher(params: Params, unet, schedule: Schedule, num_timesteps: int) -> Params:
    """The teacher's UNet as a first guess of a velocity.

    Near noise the velocity X1 − X0 is almost −X0, so a noise predictor begins with the wrong sign: the last layer is
    negated. And its clock counts tau, where a flow's counts steps · (1 − t): the first layer behind the sinusoids is
    fitted anew, by least squares over t, so that it says at t what it said at the tau of equal signal-to-noise ratio.

    Args:
      params: the teacher's.
      unet: its network.
      steps: what the flow's clock counts at noise.
    """
    t = (np.arange(num_timesteps) + 0.5) / num_timesteps
    config = unet.config
    sinusoids = [
        np.asarray(
            timestep_embedding(
                jnp.asarray(clock, jnp.float32), config.block_out_channels[0], config.flip_sin_to_cos, config.freq_shift
            ),
            np.float64,
        )
        for clock in (num_timesteps * (1 - t), equal_noise(schedule, t))
    ]
    refitted = refit(*sinusoids, np.asarray(params[_CLOCK_LAYER], np.float64))
    negated = {name: -np.asarray(params[name]) for name in ("conv_out.kernel", "conv_out.bias")}
    return params | negated | {_CLOCK_LAYER: refitted.astype(np.float32)}


def equal_noise(schedule: Schedule, t: Float[np.ndarray, " T"]) -> Float[np.ndarray, " T"]:
    """tau at which the teacher's alpha / sigma is t / (1 − t), real-valued; its ends where the schedule does not reach."""
    abar = np.asarray(schedule.abar, np.float64)
    return np.interp(np.log(t / (1 - t)), np.log(abar / (1 - abar))[::-1] / 2, np.arange(len(abar))[::-1])


def refit(ours: Float[np.ndarray, "T F"], theirs: Float[np.ndarray, "T F"], kernel: Float[np.ndarray, "F D"]):
    """The kernel [F, D] that makes of `ours` what `kernel` makes of `theirs`, as nearly as ridge regression gets."""
    gram = ours.T @ ours / len(ours) + _RIDGE * np.eye(ours.shape[1])
    return np.linalg.solve(gram, ours.T @ (theirs @ kernel) / len(ours))
