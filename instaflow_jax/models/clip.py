"""CLIP (Radford et al., 2021), named like transformers' classes.

`CLIPTextModel` conditions Stable Diffusion; `CLIPModel`, both towers, gives the CLIP score.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from instaflow_jax.arrays import AnyArray, TokenIds
from instaflow_jax.models.layers import RANDOM_INIT, LayerFactory, activation, attend
from instaflow_jax.models.net import Config, Model, Net
from instaflow_jax.weights import hub

_LEGACY_EOS = 2  # the end-of-text id in older files, which is wrong


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig(Config):
    """The text tower's `config.json`; the defaults are transformers'."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig(Config):
    """The image tower's part of `config.json`; the defaults are transformers'."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5


@dataclasses.dataclass(frozen=True)
class CLIPConfig(Config):
    """Both towers and the width of the embedding space they share."""

    text_config: CLIPTextConfig = CLIPTextConfig()
    vision_config: CLIPVisionConfig = CLIPVisionConfig()
    projection_dim: int = 512
    logit_scale_init_value: float = 2.6592

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "CLIPConfig":
        """Reads `config.json`; `*_config_dict` in older files take precedence over `*_config`, as in transformers."""
        towers = {}
        for key, tower in (("text_config", CLIPTextConfig), ("vision_config", CLIPVisionConfig)):
            stated = [raw[k] for k in (f"{key}_dict", key) if raw.get(k) is not None]
            if stated and not isinstance(stated[0], dict):
                raise ValueError(f"config.json: {key}={stated[0]!r} is not supported; use an object with its fields")
            towers[key] = tower.from_dict(stated[0] if stated else {})
        return super().from_dict(raw | towers)


class TextOutput(NamedTuple):
    """The states of all tokens [B, L, C] after the last norm, and that of the end-of-text token [B, C]."""

    last_hidden_state: Array
    pooler_output: Array


class CLIPOutput(NamedTuple):
    """Cosine similarities [images, texts] and [texts, images] times exp(logit_scale), and the unit embeddings."""

    logits_per_image: Array
    logits_per_text: Array
    text_embeds: Array
    image_embeds: Array


class Attention(nnx.Module):
    def __init__(self, config, factory: LayerFactory):
        width, heads = config.hidden_size, config.num_attention_heads
        if heads < 1 or width % heads:
            raise ValueError(f"config.json: hidden_size={width} is not divisible by num_attention_heads={heads}")
        self.heads, self.implementation, self.kernels = heads, factory.attention, factory.kernels
        self.k_proj = factory.linear(width, width)
        self.v_proj = factory.linear(width, width)
        self.q_proj = factory.linear(width, width)
        self.out_proj = factory.linear(width, width)

    def __call__(self, x, causal: bool):
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.out_proj(attend(q, k, v, self.heads, self.implementation, self.kernels, causal))


class MLP(nnx.Module):
    def __init__(self, config, factory: LayerFactory):
        self.act = activation(config.hidden_act)
        self.fc1 = factory.linear(config.hidden_size, config.intermediate_size)
        self.fc2 = factory.linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x):
        return self.fc2(self.act(self.fc1(x)))


class EncoderLayer(nnx.Module):
    def __init__(self, config, factory: LayerFactory):
        self.self_attn = Attention(config, factory)
        self.layer_norm1 = factory.layer_norm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(config, factory)
        self.layer_norm2 = factory.layer_norm(config.hidden_size, config.layer_norm_eps)

    def __call__(self, x, causal: bool):
        x = x + self.self_attn(self.layer_norm1(x), causal)
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nnx.Module):
    def __init__(self, config, factory: LayerFactory):
        self.layers = nnx.List([EncoderLayer(config, factory) for _ in range(config.num_hidden_layers)])

    def __call__(self, x, causal: bool):
        for layer in self.layers:
            x = layer(x, causal)
        return x


class TextEmbeddings(nnx.Module):
    def __init__(self, config: CLIPTextConfig, factory: LayerFactory):
        self.token_embedding = factory.embed(config.vocab_size, config.hidden_size)
        self.position_embedding = factory.embed(config.max_position_embeddings, config.hidden_size)

    def __call__(self, ids):
        length, limit = ids.shape[1], self.position_embedding.num_embeddings
        if length > limit:
            raise ValueError(
                f"prompts of {length} tokens exceed the text encoder's {limit} positions; "
                "tokenize with the tokenizer of this model"
            )
        return self.token_embedding(ids) + self.position_embedding(jnp.arange(length))


class TextTransformer(nnx.Module):
    def __init__(self, config: CLIPTextConfig, factory: LayerFactory):
        self.eos_token_id = config.eos_token_id
        self.embeddings = TextEmbeddings(config, factory)
        self.encoder = Encoder(config, factory)
        self.final_layer_norm = factory.layer_norm(config.hidden_size, config.layer_norm_eps)

    def __call__(self, ids: TokenIds) -> TextOutput:
        x = self.final_layer_norm(self.encoder(self.embeddings(ids), causal=True))
        # Files with the wrong id rely on end-of-text being the highest id of the vocabulary.
        is_end = ids if self.eos_token_id == _LEGACY_EOS else ids == self.eos_token_id
        end = jnp.argmax(is_end, axis=-1)
        return TextOutput(x, jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0])


class VisionEmbeddings(nnx.Module):
    def __init__(self, config: CLIPVisionConfig, factory: LayerFactory):
        self.image_size, width = config.image_size, config.hidden_size
        if not 1 <= config.patch_size <= config.image_size:
            raise ValueError(
                f"config.json: patch_size={config.patch_size} does not fit image_size={config.image_size}; use a "
                "patch_size from 1 to image_size"
            )
        patches = (config.image_size // config.patch_size) ** 2
        self.class_embedding = nnx.Param(jnp.zeros(width), **{RANDOM_INIT: True})
        self.patch_embedding = factory.conv(
            config.num_channels, width, config.patch_size, config.patch_size, bias=False
        )
        self.position_embedding = factory.embed(patches + 1, width)

    def __call__(self, pixels):
        if pixels.shape[1:3] != (self.image_size,) * 2:
            raise ValueError(
                f"images of {pixels.shape[1]}x{pixels.shape[2]} pixels; this CLIP takes "
                f"{self.image_size}x{self.image_size}: resize them first"
            )
        patches = self.patch_embedding(pixels)
        patches = patches.reshape(len(pixels), -1, patches.shape[-1])
        first = jnp.broadcast_to(self.class_embedding[...], (len(pixels), 1, patches.shape[-1]))
        tokens = jnp.concatenate([first.astype(patches.dtype), patches], axis=1)
        return tokens + self.position_embedding(jnp.arange(tokens.shape[1]))


class VisionTransformer(nnx.Module):
    def __init__(self, config: CLIPVisionConfig, factory: LayerFactory):
        self.embeddings = VisionEmbeddings(config, factory)
        # "layrnorm" is the reference's spelling.
        self.pre_layrnorm = factory.layer_norm(config.hidden_size, config.layer_norm_eps)
        self.encoder = Encoder(config, factory)
        self.post_layernorm = factory.layer_norm(config.hidden_size, config.layer_norm_eps)

    def __call__(self, pixels):
        x = self.encoder(self.pre_layrnorm(self.embeddings(pixels)), causal=False)
        return self.post_layernorm(x[:, 0])


class _Transformers(Model):
    """Adds to a config the keys that transformers needs to open what `save_pretrained` writes."""

    model_type: ClassVar[str]

    @classmethod
    def from_config(cls, raw: dict[str, Any], **options) -> Net:
        return super().from_config({"architectures": [cls.__name__], "model_type": cls.model_type} | raw, **options)


class CLIPTextModel(_Transformers):
    """The text encoder: token ids → `TextOutput`; Stable Diffusion is conditioned on `last_hidden_state`.

    There is no padding mask: Stable Diffusion attends to padding too.
    """

    Config = CLIPTextConfig
    layout = hub.Layout("model", "pytorch_model", "flax_model.msgpack", rename_key=hub.add_text_model_prefix)
    model_type = "clip_text_model"

    def __init__(self, config: CLIPTextConfig, factory: LayerFactory):
        self.text_model = TextTransformer(config, factory)

    def __call__(self, ids: TokenIds) -> TextOutput:
        return self.text_model(ids)


class CLIPModel(_Transformers):
    """Text and image towers with their projections into one embedding space."""

    Config = CLIPConfig
    layout = hub.Layout("model", "pytorch_model", "flax_model.msgpack")
    model_type = "clip"

    def __init__(self, config: CLIPConfig, factory: LayerFactory):
        self.text_model = TextTransformer(config.text_config, factory)
        self.vision_model = VisionTransformer(config.vision_config, factory)
        self.visual_projection = factory.linear(config.vision_config.hidden_size, config.projection_dim, bias=False)
        self.text_projection = factory.linear(config.text_config.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nnx.Param(jnp.asarray(config.logit_scale_init_value, jnp.float32))

    def get_text_features(self, ids: TokenIds) -> Float[Array, "B D"]:
        """Projected end-of-text states, not normalised."""
        return self.text_projection(self.text_model(ids).pooler_output)

    def get_image_features(self, pixels: Float[AnyArray, "B H W C"]) -> Float[Array, "B D"]:
        """Projected class tokens, not normalised, of `pixels` normalised as `preprocessor_config.json` says."""
        return self.visual_projection(self.vision_model(pixels))

    def __call__(self, ids: Int[AnyArray, "T L"], pixels: Float[AnyArray, "I H W C"]) -> CLIPOutput:
        text, image = _unit(self.get_text_features(ids)), _unit(self.get_image_features(pixels))
        logits = jnp.exp(self.logit_scale[...]) * image @ text.T
        return CLIPOutput(logits, logits.T, text, image)


def _unit(x):
    x = x.astype(jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
