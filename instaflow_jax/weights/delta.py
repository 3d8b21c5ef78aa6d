"""Delta weights: the change that made a custom Stable Diffusion, added to a flow that began as the same model."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from instaflow_jax.arrays import Params
from instaflow_jax.weights import port


@dataclasses.dataclass(frozen=True)
class Delta:
    """W += scale·(custom − origin) for the UNet; autoencoder, text encoder and tokenizer become the custom model's.

    Attributes:
      custom, origin: directories, hub ids or single files; both models were trained from `origin`.
    """

    custom: str
    origin: str
    scale: float


def add_delta(params: Params, custom: Params, origin: Params, scale: float, *, names: Mapping[str, str]) -> Params:
    """params + scale·(custom − origin), host arrays.

    Args:
      names: names for the error message, {"custom": …, "origin": …}.

    Raises:
      ValueError: the three do not have the same architecture; names the weights that differ.
    """
    for role, others in (("custom", custom), ("origin", origin)):
        misshapen = [
            f"{port.torch_key(name)} {others[name].shape}, not {weight.shape}"
            for name, weight in params.items()
            if name in others and others[name].shape != weight.shape
        ]
        port.raise_for_mismatch(
            f"{role}={names[role]!r} has another architecture than the model it changes",
            missing=params.keys() - others.keys(),
            extra=others.keys() - params.keys(),
            misshapen=misshapen,
        )
    return {name: weight + np.float32(scale) * (custom[name] - origin[name]) for name, weight in params.items()}
