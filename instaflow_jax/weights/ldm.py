"""Single-file checkpoints (`.safetensors`, `.ckpt`) in the naming of the original Latent Diffusion code.

The rules run from our names to the file's, so that the networks' configs say which keys a file must hold. Those names
number layers in the order in which CompVis' constructors make them; the text encoder is transformers' CLIP (SD 1.x) or
OpenCLIP's (SD 2.x).
"""

import itertools
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from instaflow_jax.arrays import Params
from instaflow_jax.models.clip import CLIPTextModel
from instaflow_jax.models.net import Net
from instaflow_jax.models.unet import UNetConfig
from instaflow_jax.models.vae import VAEConfig
from instaflow_jax.weights import hub, port

_UNET, _VAE = "model.diffusion_model.", "first_stage_model."
_CLIP, _OPENCLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
# What such files carry beside the networks: schedules (names without a dot), a second copy of the weights averaged in
# training, the autoencoder's discriminator, projections that Stable Diffusion does not use, constants.
_BESIDE = (
    r"^[^.]+$|^model_ema\.|^first_stage_model\.loss\.|^cond_stage_model\.(\w+\.)?(logit_scale|text_projection)\b|"
    r"\.position_ids$"
)
Place = tuple[str, int | None]  # key in the file; which third of it (query, key, value), or None for all of it


# ---------------------------------------------------------------- names

_UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_LAYERS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_LAYERS = {
    "conv_shortcut": "nin_shortcut",
    "conv_norm_out": "norm_out",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
_OPENCLIP_LAYERS = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_OPENCLIP_ENDS = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}


def unet_key(key: str, config: UNetConfig) -> str:
    """`down_blocks.0.resnets.1.conv1.weight` → `model.diffusion_model.input_blocks.2.0.in_layers.2.weight`."""
    layer, _, word = key.rpartition(".")
    if layer in _UNET_ENDS:
        return f"{_UNET}{_UNET_ENDS[layer]}.{word}"
    block, kind, j, layer = re.fullmatch(r"([a-z_]+(?:\.\d+)?)\.([a-z]+)\.(\d+)\.(.+)", layer).groups()
    if kind == "resnets":
        layer = _UNET_LAYERS[layer]
    return f"{_UNET}{_unet_place(block, kind, int(j), config)}.{'op' if kind == 'downsamplers' else layer}.{word}"


def _unet_place(block: str, kind: str, j: int, config: UNetConfig) -> str:
    """Where CompVis' flat lists have the j-th layer of a kind: a list entry is what lies between two skips."""
    side, _, number = block.partition("_blocks.")
    after, entries = int(kind == "attentions"), config.layers_per_block + 1
    if side == "mid_block":
        return f"middle_block.{1 if after else 2 * j}"
    if side == "down":
        return f"input_blocks.{1 + int(number) * entries + (entries - 1 if kind == 'downsamplers' else j)}.{after}"
    if kind == "upsamplers":  # it follows the block's last resnet, and that one's attention
        j, after = entries - 1, 1 + config.up_block_types[int(number)].startswith("CrossAttn")
    return f"output_blocks.{int(number) * entries + j}.{after}"


def vae_key(key: str, config: VAEConfig) -> str:
    """`decoder.up_blocks.0.resnets.1.conv1.weight` → `first_stage_model.decoder.up.3.block.1.conv1.weight`."""
    last = len(config.block_out_channels) - 1  # the way up is counted from the picture's side there
    key = re.sub(r"up_blocks\.(\d+)", lambda found: f"up.{last - int(found[1])}", key).replace("down_blocks.", "down.")
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", key)
    key = key.replace("mid_block.attentions.0", "mid.attn_1").replace(".resnets.", ".block.")
    key = re.sub(r"(down|up)samplers\.0", r"\1sample", key)
    return _VAE + re.sub(
        r"\b({})(?=\.\w+$)".format("|".join(map(re.escape, _VAE_LAYERS))), lambda found: _VAE_LAYERS[found[1]], key
    )


def openclip_place(key: str) -> Place:
    """Place of a text encoder's weight; queries, keys and values lie in one array there."""
    key = key.removeprefix("text_model.")
    if key in _OPENCLIP_ENDS:
        return _OPENCLIP + _OPENCLIP_ENDS[key], None
    number, layer, word = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(\w+)", key).groups()
    block = f"{_OPENCLIP}transformer.resblocks.{number}."
    if fused := re.fullmatch(r"self_attn\.([qkv])_proj", layer):
        return f"{block}attn.in_proj_{word}", "qkv".index(fused[1])
    return f"{block}{_OPENCLIP_LAYERS[layer]}.{word}", None


def places(name: str, net: Net, openclip: bool) -> dict[str, Place]:
    """PyTorch key of each weight of "unet", "vae" or "text_encoder" → its place in a single file."""
    keys = map(port.torch_key, net.shapes)
    if name == "unet":
        return {key: (unet_key(key, net.config), None) for key in keys}
    if name == "vae":
        return {key: (vae_key(key, net.config), None) for key in keys}
    return {key: openclip_place(key) if openclip else (_CLIP + key, None) for key in keys}


# ---------------------------------------------------------------- reading


def read(path: Path, nets: Mapping[str, Net]) -> dict[str, Params]:
    """The weights of a whole Stable Diffusion from one file.

    Of SD 2.x files the last text block is left out, as Stable Diffusion does, where the config has one block less. Weights
    averaged in training (`model_ema.`) are left out: published files hold the average as the model itself.

    Args:
      nets: "unet", "vae" and "text_encoder".

    Raises:
      ValueError: naming every missing, extra or misshapen weight.
    """
    stored = {_respell(key): get for key, get in port.open_weights(path).items()}
    if not any(key.startswith(_UNET) for key in stored):
        raise ValueError(
            f"{path} holds no {_UNET}… and so is no checkpoint in the original naming; it holds "
            f"{', '.join(itertools.islice(stored, 3))}, …"
        )
    openclip = any(key.startswith(_OPENCLIP) for key in stored)
    tables = {name: places(name, net, openclip) for name, net in nets.items()}
    _check(path, stored, tables, nets["text_encoder"].config.num_hidden_layers)
    return {name: _fill(path, stored, name, net, tables[name]) for name, net in nets.items()}


def _respell(key: str) -> str:
    """Some files hold the inner text model: `cond_stage_model.transformer.encoder…`."""
    return _CLIP + CLIPTextModel.layout.rename_key(key.removeprefix(_CLIP)) if key.startswith(_CLIP) else key


def _check(path: Path, stored: port.Stored, tables: Mapping[str, Mapping[str, Place]], text_blocks: int) -> None:
    beside = re.compile(rf"{_BESIDE}|^{re.escape(_OPENCLIP)}transformer\.resblocks\.{text_blocks}\.")
    wanted = {place[0] for table in tables.values() for place in table.values()}
    held = {key for key in stored if not beside.search(key)}
    port.complain(
        f"{path} does not fit the networks that the base's configs describe", missing=wanted - held, extra=held - wanted
    )


def _fill(path: Path, stored: port.Stored, name: str, net: Net, table: Mapping[str, Place]) -> Params:
    ranks = {port.torch_key(name): len(shape.shape) for name, shape in net.shapes.items()}
    readers = {key: _reader(stored, *place, ranks[key]) for key, place in table.items()}
    return port.fill(readers, net.shapes, hub.Layout(), source=f"{path} ({name})")


def _reader(stored: port.Stored, key: str, third: int | None, rank: int):
    def get() -> np.ndarray:
        array = stored[key]()
        if rank == 2 and array.shape[2:] == (1, 1):  # the autoencoder's attention is made of 1×1 convolutions there
            return array[..., 0, 0]
        size = len(array) // 3 if third is not None else 0
        return array if third is None else array[third * size : (third + 1) * size]

    return get
