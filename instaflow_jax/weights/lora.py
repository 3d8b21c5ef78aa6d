"""LoRA files merged into weights: W += m·(alpha/rank)·up@down, for linear layers and convolutions.

Read as kohya's trainer writes them (`lora_unet_down_blocks_0_…_to_q.lora_down.weight`), as diffusers does, now
(`unet.down_blocks.0.….to_q.lora_A.weight`) and before peft (`….to_q.lora.down.weight`, `….processor.to_q_lora.down.weight`),
and as peft does (`base_model.model.….lora_A.weight` beside an `adapter_config.json`).
"""

import collections
import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from instaflow_jax.arrays import Params
from instaflow_jax.infra import files
from instaflow_jax.weights import port

_KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
_PEFT = "base_model.model."
_PART = re.compile(
    r"(.+?)\.(?:lora\.|lora_linear_layer\.)?(lora_down|lora_A|down|lora_up|lora_B|up)\.weight|(.+)\.alpha"
)
_PART_NAMES = {"lora_down": "down", "lora_A": "down", "lora_up": "up", "lora_B": "up", None: "alpha"}
_OTHER_FORMULAS = ("use_dora", "use_rslora", "lora_bias")  # fields of peft's config that ask for one
Target = tuple[str, str]  # network, parameter


@dataclasses.dataclass(frozen=True)
class Layer:
    """What a file adds to one weight.

    Attributes:
      down: [rank, inputs, …kernel], up: [outputs, rank, …], as PyTorch has them.
      alpha: the file's own scale, over the rank.
    """

    down: np.ndarray
    up: np.ndarray
    alpha: float

    def delta(self) -> np.ndarray:
        """(alpha/rank)·up@down in PyTorch's layout, float32; shaped like `down` but for its first axis.

        Raises:
          ValueError: the two do not have one rank.
        """
        rank, outputs = len(self.down), len(self.up)
        if self.up.size != outputs * rank:
            raise ValueError(f"lora_up {self.up.shape} and lora_down {self.down.shape} have no rank in common")
        up, down = self.up.reshape(outputs, rank), self.down.reshape(rank, -1)
        return (self.alpha / rank * (up @ down)).reshape(outputs, *self.down.shape[1:])


def merge(params: Mapping[str, Params], path: str | Path, scale: float) -> dict[str, Params]:
    """The weights with a LoRA file added to them `scale` times; several files are merged one after the other.

    Args:
      params: those of "unet" and "text_encoder" (others are left alone), host arrays, which are not changed.
      path: `.safetensors`, or a PyTorch file.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no LoRA, or holds something that is not understood or does not fit; names all of it.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such LoRA file")
    merged = {name: dict(weights) for name, weights in params.items()}
    wrong = []
    for (net, name), layer in read(path, params).items():
        weight = merged[net][name]
        try:
            merged[net][name] = weight + np.float32(scale) * _shaped(port.from_torch(name, layer.delta()), weight)
        except ValueError as error:
            wrong.append(f"{port.torch_key(name)} of {net}: {error}")
    port.complain(f"{path} does not fit this model", misshapen=wrong)
    return merged


def _shaped(delta: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """A linear layer and a 1×1 convolution are one; files follow the network they were trained on."""
    inner = tuple(n for n in delta.shape if n != 1), tuple(n for n in weight.shape if n != 1)
    if delta.shape != weight.shape and (inner[0] != inner[1] or {delta.ndim, weight.ndim} != {2, 4}):
        raise ValueError(f"it adds {delta.shape} to a weight of {weight.shape}, both as [kernel, inputs, outputs]")
    return delta.reshape(weight.shape)


# ---------------------------------------------------------------- reading


def read(path: Path, params: Mapping[str, Params]) -> dict[Target, Layer]:
    """The layers of a LoRA file by the weight they belong to; see `merge`."""
    targets, config = _targets(params), _config(path)
    parts, unknown = {}, []
    for key, get in port.open_weights(path).items():
        found = _PART.fullmatch(_today(key))
        module, part = (found[1] or found[3], _PART_NAMES.get(found[2], found[2])) if found else (None, None)
        if module in targets:
            parts.setdefault(module, {})[part] = np.asarray(get(), np.float32)
        else:
            unknown.append(key)
    halves = [module for module, held in parts.items() if not {"up", "down"} <= held.keys()]
    port.complain(f"{path} is no LoRA of this model", unknown=unknown, **{"without up or down": halves})
    common = _common_ranks((targets[module][0], len(held["down"])) for module, held in parts.items())
    return {
        targets[module]: Layer(held["down"], held["up"], _alpha(module, held, config, common[targets[module][0]]))
        for module, held in parts.items()
    }


def _today(key: str) -> str:
    """The first diffusers versions kept LoRAs in attention processors: `attn1.processor.to_out_lora.down.weight`."""
    return re.sub(r"\.processor\.(to_\w+)_lora\.", r".\1.lora.", key).replace(".to_out.lora.", ".to_out.0.lora.")


def _targets(params: Mapping[str, Params]) -> dict[str, Target]:
    """Every name that a layer goes by in some file → its weight."""
    targets = {}
    for net, prefix in _KOHYA.items():
        for name in params[net]:
            module, _, last = name.rpartition(".")
            if last == "kernel":
                names = (prefix + module.replace(".", "_"), f"{net}.{module}", _PEFT + module)
                targets |= dict.fromkeys(names, (net, name))
    return targets


def _common_ranks(ranks: Iterable[tuple[str, int]]) -> dict[str, int]:
    """The rank that most layers of each network have."""
    counts = {}
    for net, rank in ranks:
        counts.setdefault(net, collections.Counter())[rank] += 1
    return {net: counter.most_common(1)[0][0] for net, counter in counts.items()}


def _alpha(module: str, held: Mapping[str, np.ndarray], config: Mapping[str, Any], common: int) -> float:
    """The layer's own alpha; without one, peft's; without that the network's usual rank, as diffusers takes it."""
    if "alpha" in held:
        return float(held["alpha"].reshape(()))
    name = module.removeprefix(_PEFT)
    net = name.partition(".")[0]
    fields = config.get(net, config.get("", {}))
    for pattern, alpha in fields.get("alpha_pattern", {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", name):
            return float(alpha)
    return float(fields.get("lora_alpha", common))


def _config(path: Path) -> dict[str, dict[str, Any]]:
    """peft's config by network: that in the file's metadata, as diffusers writes it, or under "" the one beside it.

    Raises:
      ValueError: it asks for another formula.
    """
    packed = json.loads(port.read_metadata(path).get("lora_adapter_metadata", "{}"))
    config = {}
    for key, value in packed.items():
        net, _, field = key.partition(".")
        config.setdefault(net, {})[field] = value
    beside = path.with_name("adapter_config.json")
    if not config and beside.is_file():
        config = {"": files.read_json(beside)}
    strange = sorted({field for fields in config.values() for field in _OTHER_FORMULAS if fields.get(field)})
    if strange:
        raise ValueError(
            f"{path} is made with {', '.join(strange)}, which is not W + scale·up@down; merge it with peft"
        )
    return config
