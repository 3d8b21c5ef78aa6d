"""Low-rank adapters (LoRA, arXiv 2106.09685): two small trained matrices beside each frozen kernel.

A kernel W [*window, inputs, outputs] becomes W + alpha/rank · A @ B, with A [*window, inputs, rank] and B [rank,
outputs], for a convolution [1, 1, rank, outputs]; in PyTorch's layout these are peft's lora_A and lora_B. The sum is
made inside of the loss, so that every loss sees ordinary weights, and the loss is exactly that of the merged model. It
takes the memory of the adapted kernels and of their gradients; adding A @ B to activations instead would take that of
the activations.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from instaflow_jax.arrays import AnyArray, Key, Params
from instaflow_jax.train.step import Loss
from instaflow_jax.weights import port
from instaflow_jax.weights.lora import Layer, Target

BASE = "base"  # the entry of `frozen` that holds the weights which the adapters belong to
_A, _B = ".lora_A.kernel", ".lora_B.kernel"  # end the adapters' names; they begin with the layer's
Ranks = Mapping[str, int]  # name of an adapted kernel → its rank


@dataclasses.dataclass(frozen=True)
class Lora:
    """Which layers get adapters, and of what rank; the fields of `configs/reflow.py:lora`.

    A pattern is a regular expression that must match the last words of a layer's dotted name.

    Attributes:
      rank: of layers that no pattern of `ranks` matches.
      alpha: of all layers; their scale is alpha/rank.
      targets: patterns of the adapted layers.
      ranks: (pattern, rank) of adapted layers; the first that matches counts.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    ranks: tuple[tuple[str, int], ...] = ()


def find_ranks(lora: Lora, shapes: Mapping[str, Any]) -> dict[str, int]:
    """The adapted kernels of a network, sorted by name.

    Args:
      shapes: the network's parameters, or their shapes, by name.

    Raises:
      ValueError: a pattern matches no layer or is not a regular expression.
    """
    layers = sorted(name.removesuffix(".kernel") for name in shapes if name.endswith(".kernel"))
    adapted = {layer for target in lora.targets for layer in _matches("targets", target, layers)}
    ranks = dict.fromkeys(sorted(adapted), lora.rank)
    for pattern, rank in reversed(lora.ranks):
        ranks |= dict.fromkeys(_matches("ranks", pattern, ranks), rank)
    return {f"{layer}.kernel": rank for layer, rank in ranks.items()}


def _matches(field: str, pattern: str, layers: Iterable[str]) -> list[str]:
    try:
        found = [layer for layer in layers if re.fullmatch(rf"(.*\.)?({pattern})", layer)]
    except re.error as error:
        raise ValueError(f"config.lora.{field}: {pattern!r} is not a regular expression: {error.msg}") from error
    if not found:
        whose = "of the U-Net" if field == "targets" else "that config.lora.targets match"
        raise ValueError(
            f"config.lora.{field}: {pattern!r} matches no layer {whose}; name the last words of a layer, as in "
            r"'attn2\.to_k'"
        )
    return found


def init(key: Key, ranks: Ranks, shapes: Mapping[str, Any]) -> dict[str, jax.Array]:
    """New adapters, which change nothing: A as in peft uniform in ±1/√fan-in, B zero."""
    params = {}
    for layer_key, (name, rank) in zip(jax.random.split(key, len(ranks)), ranks.items(), strict=True):
        *fan_in, outputs = shapes[name].shape
        layer, bound = name.removesuffix(".kernel"), math.prod(fan_in) ** -0.5
        params[layer + _A] = jax.random.uniform(layer_key, (*fan_in, rank), minval=-bound, maxval=bound)
        params[layer + _B] = jnp.zeros((*[1] * (len(fan_in) - 1), rank, outputs))
    return params


def merge(base: Mapping[str, AnyArray], params: Params, alpha: float) -> dict[str, AnyArray]:
    """The weights `base` with their adapters added; parameters that are not adapters are added under their own names.

    Arrays of numpy stay such.
    """
    sums, others = {}, {}
    for name, value in params.items():
        if name.endswith(_A):
            layer = name.removesuffix(_A)
            delta = value @ params[layer + _B]
            sums[f"{layer}.kernel"] = base[f"{layer}.kernel"] + alpha / value.shape[-1] * delta
        elif not name.endswith(_B):
            others[name] = value
    return {**base, **sums, **others}


def adapt(loss: Loss, alpha: float, base: str, others: Mapping[str, str]) -> Loss:
    """A loss of complete weights as a loss of their adapters.

    Args:
      base: entry of `frozen` with the weights that the adapters belong to.
      others: entries of `frozen` that hold adapters too → entries with the weights that these belong to.
    """

    def adapted(params, frozen, batch, key):
        with jax.default_matmul_precision("highest"):  # a TPU's default would round the factors to bfloat16
            complete = merge(frozen[base], params, alpha)
            changed = {name: merge(frozen[source], frozen[name], alpha) for name, source in others.items()}
        return loss(complete, {**frozen, **changed}, batch, key)

    return adapted


def freeze(net: Any, base: Mapping[str, Any], ranks: Ranks) -> dict[str, Any]:
    """Weights, or their shapes, as `frozen` holds them: adapted kernels as they are, the others as `Net.cast` has them.

    So only adapted kernels take float32's memory, and outputs stay the same, bit for bit.
    """
    return {**net.cast(base), **{name: base[name] for name in ranks}}


def to_layers(params: Params, alpha: float) -> dict[Target, Layer]:
    """The adapters of a U-Net as LoRA files hold them."""
    layers = {}
    for layer in (name.removesuffix(_A) for name in params if name.endswith(_A)):
        down, up = (port.to_torch(layer + part, params[layer + part]) for part in (_A, _B))
        layers["unet", f"{layer}.kernel"] = Layer(down, up, alpha)
    return layers
