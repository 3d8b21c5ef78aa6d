"""Reads and writes single-file checkpoints with the names of the original Latent Diffusion code.

The rules map our names to the file's, so the networks' configs say which keys a file must have. The file's names number
layers in the order in which CompVis' constructors create them. The text encoder is transformers' CLIP (SD 1.x) or
OpenCLIP's (SD 2.x). Reading and writing use the same rules.
"""

import collections
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from instaflow_jax.arrays import Params
from instaflow_jax.infra.messages import first_ten
from instaflow_jax.weights import hub, port

_UNET, _VAE = "model.diffusion_model.", "first_stage_model."
_CLIP, _OPENCLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
_CONTROL, _HINT, _CONDITION = "control_model.", "input_hint_block.", "controlnet_cond_embedding."
_PREFIXES = {"unet": _UNET, "vae": _VAE, "text_encoder": "cond_stage_model."}
DTYPES = {"float16": np.float16, "float32": np.float32}  # of the weights in files that are written here
_PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "sample": "sample", "flow": "flow_prediction"}  # ModelSpec's
_EMA = "ema"  # variant of a single file: the UNet's EMA weights instead of the last ones
# Keys in such files that are not part of the networks: schedules (names without a dot), the EMA copy of the weights,
# the autoencoder's discriminator, projections that Stable Diffusion does not use, constants.
_EXTRA = (
    r"^[^.]+$|^model_ema\.|^first_stage_model\.loss\.|^cond_stage_model\.(\w+\.)?(logit_scale|text_projection)\b|"
    r"\.position_ids$"
)
Place = tuple[str, int | None]  # key in the file; which third of it (query, key, value), or None for all of it


# ---------------------------------------------------------------- names

_UNET_ENDS = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
_UNET_ENDS |= {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
_UNET_LAYERS = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3"}
_UNET_LAYERS |= {"time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}
_VAE_LAYERS = {"conv_shortcut": "nin_shortcut", "conv_norm_out": "norm_out", "group_norm": "norm"}
_VAE_LAYERS |= {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_VAE_ATTENTION = r"to_q|to_k|to_v|to_out\.0|group_norm"  # of these layers, diffusers' names occur in single files
_OPENCLIP_LAYERS = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
_OPENCLIP_LAYERS |= {"self_attn.out_proj": "attn.out_proj"}
_OPENCLIP_ENDS = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}


def unet_key(key: str, config: Any) -> str:
    """`down_blocks.0.resnets.1.conv1.weight` → `model.diffusion_model.input_blocks.2.0.in_layers.2.weight`."""
    layer, _, word = key.rpartition(".")
    if layer in _UNET_ENDS:
        return f"{_UNET}{_UNET_ENDS[layer]}.{word}"
    block, group, j, layer = re.fullmatch(r"([a-z_]+(?:\.\d+)?)\.([a-z]+)\.(\d+)\.(.+)", layer).groups()
    if group == "resnets":
        layer = _UNET_LAYERS[layer]
    return f"{_UNET}{_unet_place(block, group, int(j), config)}.{'op' if group == 'downsamplers' else layer}.{word}"


def _unet_place(block: str, group: str, j: int, config: Any) -> str:
    """Position in CompVis' flat lists of the j-th layer of a group; a list entry is what lies between two skips."""
    side, _, number = block.partition("_blocks.")
    after, entries = int(group == "attentions"), config.layers_per_block + 1
    if side == "mid_block":
        return f"middle_block.{1 if after else 2 * j}"
    if side == "down":
        return f"input_blocks.{1 + int(number) * entries + (entries - 1 if group == 'downsamplers' else j)}.{after}"
    if group == "upsamplers":  # it follows the block's last resnet, and that resnet's attention if there is one
        j, after = entries - 1, 1 + config.up_block_types[int(number)].startswith("CrossAttn")
    return f"output_blocks.{int(number) * entries + j}.{after}"


def condition_layers(levels: int) -> dict[str, str]:
    """diffusers' name of each convolution on a ControlNet's image → the original code's name, in their order."""
    names = ["conv_in", *(f"blocks.{i}" for i in range(2 * levels - 2)), "conv_out"]
    return {f"{_CONDITION}{name}": f"{_HINT}{2 * i}" for i, name in enumerate(names)}


def control_key(key: str, config: Any) -> str:
    """`controlnet_down_blocks.3.weight` → `zero_convs.3.0.weight`; what a ControlNet copies is named as in the UNet."""
    layer, _, word = key.rpartition(".")
    layers = condition_layers(len(config.conditioning_embedding_out_channels))
    if layer in layers:
        return f"{layers[layer]}.{word}"
    if found := re.fullmatch(r"controlnet_down_blocks\.(\d+)", layer):
        return f"zero_convs.{found[1]}.0.{word}"
    return (
        f"middle_block_out.0.{word}" if layer == "controlnet_mid_block" else unet_key(key, config).removeprefix(_UNET)
    )


def vae_key(key: str, config: Any) -> str:
    """`decoder.up_blocks.0.resnets.1.conv1.weight` → `first_stage_model.decoder.up.3.block.1.conv1.weight`."""
    last = len(config.block_out_channels) - 1  # CompVis counts the decoder's levels from the image
    key = re.sub(r"up_blocks\.(\d+)", lambda found: f"up.{last - int(found[1])}", key).replace("down_blocks.", "down.")
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", key)
    key = key.replace("mid_block.attentions.0", "mid.attn_1").replace(".resnets.", ".block.")
    key = re.sub(r"(down|up)samplers\.0", r"\1sample", key)
    layers = "|".join(map(re.escape, _VAE_LAYERS))
    return _VAE + re.sub(rf"\b({layers})(?=\.\w+$)", lambda found: _VAE_LAYERS[found[1]], key)


def openclip_place(key: str) -> Place:
    """Place of a text encoder's weight; OpenCLIP stores queries, keys and values in one array."""
    key = key.removeprefix("text_model.")
    if key in _OPENCLIP_ENDS:
        return _OPENCLIP + _OPENCLIP_ENDS[key], None
    number, layer, word = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(\w+)", key).groups()
    block = f"{_OPENCLIP}transformer.resblocks.{number}."
    if fused := re.fullmatch(r"self_attn\.([qkv])_proj", layer):
        return f"{block}attn.in_proj_{word}", "qkv".index(fused[1])
    return f"{block}{_OPENCLIP_LAYERS[layer]}.{word}", None


def places(net: str, config: Any, names: Iterable[str], openclip: bool) -> dict[str, Place]:
    """PyTorch key of each weight of a network → its place in a single file.

    Args:
      net: "unet", "vae" or "text_encoder".
      config: the network's config.
      names: our names of its weights.
      openclip: whether the file's text encoder is OpenCLIP's.
    """
    keys = map(port.torch_key, names)
    if net == "unet":
        return {key: (unet_key(key, config), None) for key in keys}
    if net == "vae":
        return {key: (vae_key(key, config), None) for key in keys}
    return {key: openclip_place(key) if openclip else (_CLIP + key, None) for key in keys}


# ---------------------------------------------------------------- reading


def read(
    path: Path, configs: Mapping[str, Any], shapes: Mapping[str, port.Shapes], variant: str | None = None
) -> dict[str, Params]:
    """The weights of a Stable Diffusion from one file, as host arrays.

    An SD 2.x file has one more text block than Stable Diffusion uses; it is ignored if the config has one block less.
    Published files usually hold the average as the model itself, so the EMA copy (`model_ema.`) is read only for
    `variant="ema"`.

    Args:
      configs: of "unet", "vae" and "text_encoder".
      shapes: for each of them, the names and shapes of its parameters.
      variant: "ema" for the EMA copy of the UNet; others do not matter.

    Returns:
      the parameters by network, without those (autoencoder, text encoder) of which the file has no weight at all.

    Raises:
      ValueError: naming the missing, extra and misshapen weights.
    """
    stored = {_modernize_key(key): get for key, get in port.open_weights(path).items()}
    if not any(key.startswith(_UNET) for key in stored):
        raise ValueError(
            f"{path} has no weights named {_UNET}…, so it is not a checkpoint of the original Latent Diffusion code; "
            f"it contains {first_ten(list(stored)) or 'nothing'}"
        )
    if variant == _EMA:
        stored |= _ema(stored, path)
    openclip = any(key.startswith(_OPENCLIP) for key in stored)
    present = [net for net in shapes if any(key.startswith(_PREFIXES[net]) for key in stored)]
    tables = {net: places(net, configs[net], shapes[net], openclip) for net in present}
    _check(path, stored, tables, configs["text_encoder"].num_hidden_layers)
    return {net: _fill(stored, tables[net], shapes[net], source=f"{path} ({net})") for net in tables}


def open_control(path: Path) -> tuple[port.Stored, tuple[int, ...]]:
    """The weights of a ControlNet in one file, with the names of the original code or of diffusers.

    Returns:
      the weights, without the prefix `control_model.`, and the channels of the convolutions on the condition image.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file does not hold a ControlNet.
    """
    stored = port.open_weights(path)
    found = {key.removeprefix(_CONTROL): get for key, get in stored.items() if key.startswith(_CONTROL)} or dict(stored)
    prefix = _HINT if f"{_HINT}0.weight" in found else _CONDITION
    count = sum(key.startswith(prefix) and key.endswith(".weight") for key in found)
    layers = condition_layers(count // 2)
    keys = [f"{name}.weight" for name in (layers.values() if prefix == _HINT else layers)][:-1:2]
    if not count or not found.keys() >= set(keys):
        raise ValueError(
            f"{path} is not a ControlNet: it has no weights named {_CONDITION}… or {_CONTROL}{_HINT}…; it contains "
            f"{first_ten(list(stored)) or 'nothing'}"
        )
    return found, tuple(len(found[key]()) for key in keys)


def fill_control(stored: port.Stored, config: Any, shapes: port.Shapes, source: str) -> Params:
    """The parameters of a ControlNet from `open_control`'s weights.

    Raises:
      ValueError: it was made for a U-Net of another width, or has missing, extra or misshapen weights, which it names.
    """
    original = f"{_HINT}0.weight" in stored
    keys = {key: control_key(key, config) if original else key for key in map(port.torch_key, shapes)}
    first, width = keys["conv_in.weight"], config.block_out_channels[0]
    if first in stored and len(stored[first]()) != width:
        raise ValueError(
            f"{source}: this ControlNet has {len(stored[first]())} channels in its first block, but the U-Net has "
            f"{width}; use a ControlNet that was made for this model"
        )
    missing, extra = set(keys.values()) - stored.keys(), stored.keys() - set(keys.values())
    port.raise_for_mismatch(f"{source} is not a ControlNet of this model", missing=missing, extra=extra)
    return _fill(stored, {key: (place, None) for key, place in keys.items()}, shapes, source)


def _modernize_key(key: str) -> str:
    """Undoes what converters left: a text model saved from inside, diffusers' names in the autoencoder's attention."""
    if key.startswith(_CLIP):
        return _CLIP + hub.add_text_model_prefix(key.removeprefix(_CLIP))
    if key.startswith(_VAE):
        return re.sub(rf"(?<=\.mid\.attn_1\.)({_VAE_ATTENTION})(?=\.\w+$)", lambda f: _VAE_LAYERS[f[1]], key)
    return key


def _ema(stored: port.Stored, path: Path) -> port.Stored:
    """The UNet's keys with the EMA weights, whose names have no dots: `model_ema.diffusion_modelinput_blocks00weight`.

    Raises:
      ValueError: the file lacks the EMA copy of a weight.
    """
    names = {key: f"model_ema.{key.removeprefix('model.').replace('.', '')}" for key in stored if key.startswith(_UNET)}
    what = f"{path} has no complete EMA copy of the UNet, run without config.weights_variant={_EMA}"
    port.raise_for_mismatch(what, missing=[name for name in names.values() if name not in stored])
    return {key: stored[name] for key, name in names.items()}


def prediction_fields(path: Path) -> dict[str, Any]:
    """What a single file says of its noise schedule, as fields of `scheduler_config.json`; {} for most files.

    ComfyUI and trainers add empty tensors named `v_pred` and `ztsnr` (zero terminal SNR) to v-prediction models, or
    state the prediction type in the metadata of ModelSpec. A "flow" there predicts noise − data.
    """
    keys, metadata = port.open_weights(path).keys(), port.read_metadata(path)
    stated = metadata.get("modelspec.prediction_type") or metadata.get("modelspec.predict_key")
    kind = "v_prediction" if "v_pred" in keys else _PREDICTIONS.get(stated or "")
    fields = {"prediction_type": kind} if kind else {}
    return fields | ({"rescale_betas_zero_snr": True} if "ztsnr" in keys else {})


def _check(path: Path, stored: port.Stored, tables: Mapping[str, Mapping[str, Place]], text_blocks: int) -> None:
    ignored = re.compile(rf"{_EXTRA}|^{re.escape(_OPENCLIP)}transformer\.resblocks\.{text_blocks}\.")
    wanted = {key for table in tables.values() for key, _ in table.values()}
    present = {key for key in stored if not ignored.search(key)}
    what = f"{path} does not fit the networks that the configs in base describe"
    port.raise_for_mismatch(what, missing=wanted - present, extra=present - wanted)


def _fill(stored: port.Stored, table: Mapping[str, Place], shapes: port.Shapes, source: str) -> Params:
    ranks = {port.torch_key(name): len(shape.shape) for name, shape in shapes.items()}
    readers = {key: _reader(stored, *place, ranks[key]) for key, place in table.items()}
    return port.fill(readers, shapes, hub.Layout(), source=source)


def _reader(stored: port.Stored, key: str, third: int | None, rank: int) -> Callable[[], np.ndarray]:
    def get() -> np.ndarray:
        array = stored[key]()
        if not array.ndim:
            return array
        if rank == 2 and array.shape[2:] == (1, 1):  # CompVis' autoencoder has 1×1 convolutions in its attention
            return array[..., 0, 0]
        size = len(array) // 3 if third is not None else 0
        return array if third is None else array[third * size : (third + 1) * size]

    return get


# ---------------------------------------------------------------- writing


def write(
    path: Path,
    configs: Mapping[str, Any],
    params: Mapping[str, Params],
    scheduler: Mapping[str, Any],
    *,
    dtype: str,
    metadata: Mapping[str, str],
) -> None:
    """Writes a safetensors file that `read` turns into the same weights, each rounded once to `dtype`.

    Beside the weights it says what `prediction_fields` reads.

    Args:
      configs, params: of "unet", "vae" and "text_encoder".
      scheduler: `scheduler_config.json`.
      dtype: one of `DTYPES`.
      metadata: strings for the file's header.

    Raises:
      OSError: naming the file.
    """
    stated = {word: kind for kind, word in _PREDICTIONS.items()}[scheduler.get("prediction_type") or "epsilon"]
    marks = {"v_pred": stated == "v", "ztsnr": bool(scheduler.get("rescale_betas_zero_snr"))}
    tensors = {key: array.astype(DTYPES[dtype], order="C") for key, array in _tensors(configs, params)}
    tensors |= {name: np.zeros(0, np.float32) for name, said in marks.items() if said}
    port.write_safetensors(path, tensors, {"modelspec.prediction_type": stated, **metadata})


def _tensors(configs: Mapping[str, Any], params: Mapping[str, Params]) -> Iterator[tuple[str, np.ndarray]]:
    """Key in the file and array, the inverse of `_reader`. SD 2.x's text encoder is the one with GELU."""
    openclip = configs["text_encoder"].hidden_act == "gelu"
    for net, weights in params.items():
        arrays = {port.torch_key(name): port.to_torch(name, np.asarray(value)) for name, value in weights.items()}
        parts: dict[str, dict[int, np.ndarray]] = collections.defaultdict(dict)
        for key, (place, third) in places(net, configs[net], weights, openclip).items():
            parts[place][third or 0] = arrays[key]
        for place, thirds in parts.items():
            array = np.concatenate([thirds[i] for i in sorted(thirds)])
            convolution = array.ndim == 2 and ".mid.attn_1." in place
            yield place, array[..., None, None] if convolution else array


def check_range(weights: Mapping[str, np.ndarray], dtype: str) -> None:
    """Raises ValueError naming the first weight that is too large for one of `DTYPES`."""
    limit = float(np.finfo(DTYPES[dtype]).max)
    for name, array in weights.items():
        largest = float(np.abs(array).max(initial=0))
        if largest > limit:
            raise ValueError(f"weight {name} has values up to {largest:g}, but {dtype} ends at {limit:g}")
