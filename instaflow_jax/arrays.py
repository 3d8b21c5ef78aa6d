"""Shared names for the arrays that travel between modules; images and latents are NHWC everywhere.

Annotations only: jaxtyping checks nothing unless a caller asks it to.
"""

from collections.abc import Callable, Mapping
from typing import TypedDict

from jaxtyping import Array, Float, Int, PRNGKeyArray, Real

Latent = Float[Array, "B H W C"]  # noise X0, data X1, anything between, or a velocity
Image = Float[Array, "B H W 3"]  # pixels in [-1, 1]
Tokens = Int[Array, "B L"]  # what the tokenizer makes of a prompt
Context = Float[Array, "B L D"]  # the text encoder's last hidden state
Scalar = Float[Array, ""]
PerSample = Float[Array, "B"]
Clock = Real[Array, "B"]  # a network's own time: the flow's float clock, or the teacher's integer tau

Key = PRNGKeyArray
Params = dict[str, Array]  # a network's weights by dotted path
Batch = Mapping[str, Array]  # one minibatch, by feature name

Network = Callable[[Latent, Clock, Context], Latent]  # any conditional network, weights already bound
Predict = Callable[[Latent, Clock], Latent]  # ... its text bound too: network(Z, tau)
Velocity = Callable[[Latent, Scalar], Latent]  # dZ/dt at flow time t: velocity(Z, t)


class Pair(TypedDict):
    """Noise, the image the teacher's ODE makes of it, and the prompt it was made for."""

    X0: Latent
    X1: Latent
    tokens: Tokens
