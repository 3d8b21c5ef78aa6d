"""Delta weights: a customised Stable Diffusion's change, added to a flow that began as the same model."""

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np

from instaflow_jax.arrays import Params
from instaflow_jax.weights import port


@dataclasses.dataclass(frozen=True)
class Delta:
    """W += scale·(custom − origin) over the UNet; autoencoder, text encoder and tokenizer become the custom model's.

    Attributes:
      custom, origin: directories, hub ids or single files; origin is what both models were trained from.
    """

    custom: str
    origin: str
    scale: float


def add_delta(params: Params, custom: Params, origin: Params, scale: float, *, names: Mapping[str, str]) -> Params:
    """params + scale·(custom − origin), host arrays.

    Args:
      names: what to call the two in an error, {"custom": …, "origin": …}.

    Raises:
      ValueError: they are not of one architecture; names every weight that differs.
    """
    for role, others in (("custom", custom), ("origin", origin)):
        wrong = [
            f"{port.torch_key(name)} {others[name].shape}, not {weight.shape}"
            for name, weight in params.items()
            if name in others and others[name].shape != weight.shape
        ]
        port.complain(
            f"{role}={names[role]!r} is another architecture than the model it is to change",
            missing=params.keys() - others.keys(),
            extra=others.keys() - params.keys(),
            misshapen=wrong,
        )
    return jax.tree.map(
        lambda weight, new, old: weight + np.float32(scale) * (new - old), params, dict(custom), dict(origin)
    )
