"""The one-step program, token ids and noise → images, and its weights: what the formats without a framework contain."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from instaflow_jax import pipeline
from instaflow_jax.arrays import AnyArray, Params
from instaflow_jax.infra import images
from instaflow_jax.stages.export.source import Source

_ENCODER = ("encoder.", "quant_conv.")  # the half of the autoencoder that sampling does not use


def flat(pipe: pipeline.Pipeline) -> dict[str, np.ndarray]:
    """The weights that sampling uses, in one dict by "network/dotted name"."""
    return {
        f"{net}/{name}": np.asarray(array)
        for net, params in pipe.params.items()
        for name, array in params.items()
        if net != "vae" or not name.startswith(_ENCODER)
    }


def make_one_step(source: Source) -> Callable[[Mapping[str, AnyArray], AnyArray, AnyArray], jax.Array]:
    """`generate(weights, ids, X0)`: weights named as by `flat`, ids [B, L], X0 [B, h, w, c] → uint8 [B, H, W, 3].

    `source` is a flow. Its one Euler step, X1 = X0 + v, stands here without the solvers' loop, which would end up in
    the exported program.
    """
    nets, shapes = source.pipe.nets, source.pipe.nets["vae"].shapes
    start = float(source.dynamics.num_timesteps)
    unused = {name: jnp.zeros((), shapes[name].dtype) for name in shapes if name.startswith(_ENCODER)}

    def generate(weights, ids, X0):
        params: dict[str, Params] = {net: {} for net in nets}
        for key, array in weights.items():
            net, name = key.split("/", 1)
            params[net][name] = array
        text = nets["text_encoder"].apply(params["text_encoder"], ids).last_hidden_state
        X1 = X0 + nets["unet"].apply(params["unet"], X0, start, text)
        return images.to_uint8(nets["vae"].apply(params["vae"] | unused, X1, method="decode"))

    return generate
