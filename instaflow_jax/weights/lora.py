"""LoRA files (arXiv 2106.09685), merged into weights: W += scale·(alpha/rank)·up@down, linear layers and convolutions.

Four formats are read, and the first two are written:
  kohya's trainer: `lora_unet_down_blocks_0_…_to_q.lora_down.weight`; the text encoder is `lora_te_` or `lora_te1_`
  diffusers: `unet.down_blocks.0.….to_q.lora_A.weight`
  diffusers before peft: `….to_q.lora.down.weight`, `….processor.to_q_lora.down.weight`, the oldest without `unet.`
  peft: `base_model.model.….lora_A.weight`, with an `adapter_config.json` in the same folder

In each of them the text encoder's names may lack `text_model.`, as transformers saves them since 5.6.
"""

import collections
import dataclasses
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from instaflow_jax.arrays import Params
from instaflow_jax.infra import files, stores
from instaflow_jax.weights import port

_KOHYA = {"unet": ("lora_unet_",), "text_encoder": ("lora_te_", "lora_te1_")}
_PEFT = "base_model.model."
_PART = re.compile(
    r"(.+?)\.(?:lora\.|lora_linear_layer\.)?(lora_down|lora_A|down|lora_up|lora_B|up)\.weight|(.+)\.alpha"
)
_PART_NAMES = {"lora_down": "down", "lora_A": "down", "lora_up": "up", "lora_B": "up", None: "alpha"}
# Fields of peft's config that change the formula, and initializations that change the weights of the model itself.
_OTHER_FORMULAS = ("use_dora", "use_rslora", "use_qalora", "use_bdlora", "lora_bias", "alora_invocation_tokens")
_OTHER_WEIGHTS = ("pissa", "olora", "corda", "loftq", "lora_ga")
Target = tuple[str, str]  # network, parameter


@dataclasses.dataclass(frozen=True)
class Layer:
    """What a file adds to one weight.

    Attributes:
      down: [rank, inputs, *kernel], up: [outputs, rank, ...], in PyTorch's layout.
      alpha: the file's own scale, which is divided by the rank.
    """

    down: np.ndarray
    up: np.ndarray
    alpha: float

    def delta(self) -> np.ndarray:
        """(alpha/rank)·up@down in PyTorch's layout, float32 [outputs, inputs, *kernel].

        Raises:
          ValueError: up and down have different ranks.
        """
        rank, outputs = len(self.down), len(self.up)
        if self.up.size != outputs * rank:
            raise ValueError(f"lora_up {self.up.shape} and lora_down {self.down.shape} have different ranks")
        up, down = self.up.reshape(outputs, rank), self.down.reshape(rank, -1)
        return (self.alpha / rank * (up @ down)).reshape(outputs, *self.down.shape[1:])


def merge(params: Mapping[str, Params], path: str | Path, scale: float) -> dict[str, Params]:
    """The weights with `scale` times a LoRA file added; call it once for each file.

    Args:
      params: host arrays of "unet" and "text_encoder" (other networks are returned unchanged); not modified.
      path: `.safetensors`, or a PyTorch file.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is not a LoRA, or has keys that are unknown or do not fit; names them.
    """
    path = stores.local(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no LoRA file {path}")
    merged = {name: dict(weights) for name, weights in params.items()}
    misshapen = []
    for (net, name), layer in read(path, params).items():
        weight = merged[net][name]
        try:
            merged[net][name] = weight + np.float32(scale) * _reshape(port.from_torch(name, layer.delta()), weight)
        except ValueError as error:
            misshapen.append(f"{port.torch_key(name)} of {net}: {error}")
    port.raise_for_mismatch(f"{path} does not fit this model", misshapen=misshapen)
    return merged


def _reshape(delta: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """`delta` with the shape of `weight`; a linear layer's may be added to a 1×1 convolution and the reverse."""
    squeezed, wanted = (tuple(n for n in array.shape if n != 1) for array in (delta, weight))
    if delta.shape != weight.shape and (squeezed != wanted or {delta.ndim, weight.ndim} != {2, 4}):
        raise ValueError(f"the file adds {delta.shape} to a weight of {weight.shape}, both [*kernel, inputs, outputs]")
    return delta.reshape(weight.shape)


# ---------------------------------------------------------------- reading


def read(path: Path, params: Mapping[str, Params]) -> dict[Target, Layer]:
    """The layers of a LoRA file by the weight they change; see `merge`."""
    stored, targets = port.open_weights(path), _targets(params)
    config = _config(path, any(key.startswith(_PEFT) for key in stored))
    parts, unknown = {}, []
    for key, get in stored.items():
        found = _PART.fullmatch(_modernize_key(key))
        module, part = (found[1] or found[3], _PART_NAMES.get(found[2], found[2])) if found else (None, None)
        if module in targets:
            parts.setdefault(module, {})[part] = np.asarray(get(), np.float32)
        else:
            unknown.append(key)
    incomplete = [module for module, arrays in parts.items() if not {"up", "down"} <= arrays.keys()]
    misshapen = [
        f"{module} {part} {array.shape}"
        for module, arrays in parts.items()
        for part, array in arrays.items()
        if (array.size != 1 if part == "alpha" else array.ndim < 2 or array.size == 0)
    ]
    uses = collections.Counter(targets[module] for module in parts)
    repeated = [module for module in parts if uses[targets[module]] > 1]
    what = f"{path} is not a LoRA of this model"
    kinds = {"misshapen": misshapen, "without up or down": incomplete, "for the same layer": repeated}
    port.raise_for_mismatch(what, unknown=unknown, **kinds)
    return {
        targets[module]: Layer(arrays["down"], arrays["up"], _alpha(module, arrays, config))
        for module, arrays in parts.items()
    }


def _modernize_key(key: str) -> str:
    """The first diffusers versions trained attention processors, in the text encoder too: `attn1.processor.to_q_lora`,
    `self_attn.to_q_lora`."""
    key = re.sub(r"\.self_attn\.to_(\w+)_lora\.", r".self_attn.\1_proj.lora.", key)
    return re.sub(r"(?:\.processor)?\.(to_\w+)_lora\.", r".\1.lora.", key).replace(".to_out.lora.", ".to_out.0.lora.")


def _targets(params: Mapping[str, Params]) -> dict[str, Target]:
    """Every name that some format gives a layer → the weight it changes."""
    targets = {}
    for net, prefixes in _KOHYA.items():
        for parameter in params[net]:
            module, _, last = parameter.rpartition(".")
            if last == "kernel":
                for name in (module, module.removeprefix("text_model.")):
                    kohya = [prefix + name.replace(".", "_") for prefix in prefixes]
                    names = (*kohya, f"{net}.{name}", _PEFT + name, name)
                    targets |= dict.fromkeys(names, (net, parameter))
    return targets


def _alpha(module: str, arrays: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> float:
    """The layer's own alpha, else the one in peft's config, else its rank, so that the layer adds up@down."""
    if "alpha" in arrays:
        return float(arrays["alpha"].reshape(()))
    name = module.removeprefix(_PEFT)
    net = name.partition(".")[0]
    fields = config.get(net, config.get("", {}))
    for pattern, alpha in fields.get("alpha_pattern", {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", name):
            return float(alpha)
    return float(fields.get("lora_alpha", len(arrays["down"])))


def _config(path: Path, is_peft: bool) -> dict[str, dict[str, Any]]:
    """peft's config by network, from the file's metadata (diffusers), else for a file of peft's own from
    `adapter_config.json`, under "".

    Raises:
      ValueError: the config asks for another formula, or the metadata is damaged.
    """
    packed = port.read_metadata(path).get("lora_adapter_metadata", "{}")
    try:
        packed = dict(json.loads(packed))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path}: lora_adapter_metadata {packed[:40]!r} is not a JSON object; save the file again without it"
        ) from error
    config = {}
    for key, value in packed.items():
        net, _, field = key.partition(".")
        config.setdefault(net, {})[field] = value
    adapter = path.with_name("adapter_config.json")
    if not config and is_peft and adapter.is_file():
        config = {"": files.read_json(adapter)}
    elif not config and is_peft:
        warnings.warn(
            f"{path} has no alpha and no {adapter.name} beside it, so every layer adds up@down; "
            f"copy peft's {adapter.name} into its folder if alpha differed from the rank",
            stacklevel=2,
        )
    unsupported = {field for fields in config.values() for field in _OTHER_FORMULAS if fields.get(field)}
    unsupported |= {
        f"init_lora_weights={fields['init_lora_weights']}"
        for fields in config.values()
        if str(fields.get("init_lora_weights")).startswith(_OTHER_WEIGHTS)
    }
    if unsupported:
        raise ValueError(
            f"{path} was trained with {', '.join(sorted(unsupported))}, so its formula is not W + scale·up@down; "
            "merge it into the model with peft first"
        )
    return config


# ---------------------------------------------------------------- writing


def write_kohya(layers: Mapping[Target, Layer], path: Path) -> None:
    """Writes a file in the naming of kohya's trainer, which most programs read."""
    tensors = {}
    for (net, name), layer in layers.items():
        key = _KOHYA[net][0] + name.removesuffix(".kernel").replace(".", "_")
        tensors |= {f"{key}.lora_down.weight": layer.down, f"{key}.lora_up.weight": layer.up}
        tensors[f"{key}.alpha"] = np.float32(layer.alpha)
    _save(tensors, path, {})


def write_diffusers(layers: Mapping[Target, Layer], path: Path) -> None:
    """Writes a file in the naming of diffusers, for `load_lora_weights`.

    Its up holds the factor alpha/rank, so that programs which know no alpha in this format agree with those that read
    the metadata, where alpha is the rank.
    """
    tensors, config = {}, {}
    for (net, name), layer in layers.items():
        module, rank = name.removesuffix(".kernel"), len(layer.down)
        tensors[f"{net}.{module}.lora_A.weight"] = layer.down
        tensors[f"{net}.{module}.lora_B.weight"] = layer.up * np.float32(layer.alpha / rank)
        fields = config.setdefault(net, {"r": rank, "lora_alpha": rank, "target_modules": []})
        fields["target_modules"].append(module)
        for field in ("rank_pattern", "alpha_pattern"):
            fields.setdefault(field, {}).update({} if rank == fields["r"] else {module: rank})
    packed = {f"{net}.{field}": value for net, fields in config.items() for field, value in fields.items()}
    _save(tensors, path, {"lora_adapter_metadata": json.dumps(packed, indent=2, sort_keys=True)})


def _save(tensors: Mapping[str, np.ndarray], path: Path, metadata: dict[str, str]) -> None:
    arrays = {key: np.asarray(tensor, np.float32, order="C") for key, tensor in tensors.items()}
    port.write_safetensors(path, arrays, metadata)
