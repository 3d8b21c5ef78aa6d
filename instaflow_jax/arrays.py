"""Shared names of array types; images and latents are NHWC everywhere.

Annotations only: jaxtyping checks them while the tests run, not otherwise.
"""

from collections.abc import Callable, Mapping

import jax
import numpy as np
from jaxtyping import Float, Int, PRNGKeyArray, Real

AnyArray = jax.Array | np.ndarray  # on a device or on the host

Latent = Float[AnyArray, "B H W C"]  # noise X0, data X1, anything between, or a velocity
Image = Float[AnyArray, "B H W 3"]  # pixels in [-1, 1]
TokenIds = Int[AnyArray, "B L"]  # token ids of prompts
NullIds = Int[AnyArray, "1 L"]  # ... of the empty or negative prompt
Context = Float[AnyArray, "B L D"]  # the text encoder's last hidden state
NullContext = Float[AnyArray, "#B L D"]  # ... of the empty or negative prompt, one for all samples or one for each
Scalar = Float[AnyArray, ""]
PerSample = Float[AnyArray, " B"]
Timestep = Real[AnyArray, " B"]  # a network's own time: real for a flow, the integer tau for a teacher

Key = PRNGKeyArray
Params = Mapping[str, AnyArray]  # a network's weights by dotted path
Batch = Mapping[str, AnyArray]  # one minibatch, by feature name

Network = Callable[[Latent, Timestep, Context], Latent]  # any conditional network, weights already bound
Predict = Callable[[Latent, Timestep], Latent]  # ... its text bound too: network(Z, tau)
Velocity = Callable[[Latent, Scalar], Latent]  # dZ/dt at flow time t: velocity(Z, t)
VelocityAt = Callable[[Latent, PerSample, Timestep], Latent]  # ... and the network's own time: velocity_at(Z, t, tau)
