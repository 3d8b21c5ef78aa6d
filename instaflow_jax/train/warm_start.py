"""Converts a noise predictor's weights into initial weights of a flow."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from instaflow_jax.arrays import Params
from instaflow_jax.models.unet import timestep_embedding
from instaflow_jax.teacher import Schedule, equal_noise
from instaflow_jax.weights.conventions import scaled

_RIDGE = 1e-2  # keeps the refitted kernel from growing larger than the old one
_TIME_KERNEL = "time_embedding.linear_1.kernel"  # each half of a stacked UNet has one


def from_teacher(params: Params, unet, schedule: Schedule, num_timesteps: int) -> Params:
    """The weights of a teacher's UNet, changed to start from as a velocity network.

    Near noise the velocity X1 − X0 is almost −X0, so a noise predictor has the wrong sign: the last layer is negated. A
    teacher's timestep is tau, a flow's is num_timesteps · (1 − t): the layer behind the sinusoids is refitted, by least
    squares over t, so that its output at t is the old one at the tau of equal signal-to-noise ratio.

    Args:
      params: the teacher's.
      unet: the teacher's network.
      num_timesteps: the flow's timestep at noise (`flow.timestep`).
    """
    config, t = unet.config, (np.arange(num_timesteps) + 0.5) / num_timesteps

    @jax.jit
    def embed(timestep):
        return timestep_embedding(timestep, config.block_out_channels[0], config.flip_sin_to_cos, config.freq_shift)

    def sinusoids(timestep: Float[np.ndarray, " T"]) -> Float[np.ndarray, "T F"]:
        return np.asarray(embed(jnp.asarray(timestep, jnp.float32)), np.float64)

    flow, teacher = sinusoids(num_timesteps * (1 - t)), sinusoids(equal_noise(schedule, t))
    refitted = {
        name: refit(flow, teacher, np.asarray(kernel, np.float64)).astype(np.float32)
        for name, kernel in params.items()
        if name.endswith(_TIME_KERNEL)
    }
    return scaled(params, -1) | refitted


def refit(
    new: Float[np.ndarray, "T F"], old: Float[np.ndarray, "T F"], kernel: Float[np.ndarray, "F D"]
) -> Float[np.ndarray, "F D"]:
    """The kernel [F, D] for inputs `new` whose outputs are nearest to `old @ kernel`, by ridge regression."""
    gram = new.T @ new / len(new) + _RIDGE * np.eye(new.shape[1])
    return np.linalg.solve(gram, new.T @ (old @ kernel) / len(new))
