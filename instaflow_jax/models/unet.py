"""Stable Diffusion's UNet (1.x, 2.x and the InstaFlow checkpoints), with diffusers' class and attribute names."""

import dataclasses
import itertools
import math
import re
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Real

from instaflow_jax.arrays import AnyArray, Latent, Timestep
from instaflow_jax.models import net
from instaflow_jax.models.blocks import Downsample2D, ResnetBlock2D, Upsample2D
from instaflow_jax.models.layers import LayerFactory, Remat
from instaflow_jax.models.transformer import Transformer2DModel
from instaflow_jax.weights import hub

Middle = Float[AnyArray, "B h w D"]  # features of the middle block
Features = Float[AnyArray, "B _ _ _"]  # of any block
_OLD_SAMPLE_SIZE = 64  # latents' side that diffusers' pipelines took for files from before version 0.9


@dataclasses.dataclass(frozen=True)
class EncoderConfig(net.Config):
    """The keys of `config.json` that the UNet and its ControlNets share; see diffusers' `UNet2DConditionModel`.

    `attention_head_dim` is the NUMBER of heads, a naming mistake of diffusers that every file repeats: one int for all
    blocks (SD 1.x: 8) or one for each (SD 2.x: [5, 10, 20, 20]).
    """

    in_channels: int = 4
    flip_sin_to_cos: bool = True
    freq_shift: float = 0
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    downsample_padding: int = 1
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 1280
    transformer_layers_per_block: int = 1
    attention_head_dim: int | tuple[int, ...] = 8
    num_attention_heads: int | tuple[int, ...] | None = None
    use_linear_projection: bool = False

    fixed: ClassVar[dict[str, Any]] = {
        **dict.fromkeys(("class_embed_type", "num_class_embeds", "addition_embed_type", "cross_attention_norm"), None),
        **dict.fromkeys(("encoder_hid_dim", "encoder_hid_dim_type", "timestep_post_act", "time_cond_proj_dim"), None),
        **dict.fromkeys(("time_embedding_dim", "time_embedding_act_fn", "mid_block_only_cross_attention"), None),
        **dict.fromkeys(("reverse_transformer_layers_per_block",), None),
        **dict.fromkeys(("center_input_sample", "only_cross_attention", "dual_cross_attention"), False),
        **dict.fromkeys(("conv_in_kernel", "conv_out_kernel"), 3),
        **dict.fromkeys(("mid_block_scale_factor", "resnet_out_scale_factor"), 1),
        "act_fn": "silu",
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "time_embedding_type": "positional",
        "resnet_time_scale_shift": "default",
        "resnet_skip_time_act": False,
        "attention_type": "default",
        "dropout": 0.0,
    }

    def __post_init__(self):
        self.check_types("down_block_types", ("CrossAttnDownBlock2D", "DownBlock2D"))
        if not self.block_out_channels:
            raise ValueError("config.json: block_out_channels=[] is not supported; use the channels of each block")
        if len(self.heads) != len(self.block_out_channels) or min(self.heads) < 1:
            raise ValueError(
                f"config.json: attention_head_dim={list(self.heads)} must give the number of heads of each of "
                f"block_out_channels={list(self.block_out_channels)}"
            )

    def check_types(self, field: str, allowed: tuple[str, ...]) -> None:
        """Raises ValueError unless `field` names one of the `allowed` types for each block."""
        types = getattr(self, field)
        if len(types) != len(self.block_out_channels) or not set(types) <= set(allowed):
            raise ValueError(
                f"config.json: {field}={list(types)} must name, for each of block_out_channels="
                f"{list(self.block_out_channels)}, one of {allowed}"
            )

    @property
    def heads(self) -> tuple[int, ...]:
        """Number of attention heads of each block, outermost first."""
        heads = self.num_attention_heads or self.attention_head_dim
        return (heads,) * len(self.block_out_channels) if isinstance(heads, int) else heads


@dataclasses.dataclass(frozen=True)
class UNetConfig(EncoderConfig):
    """The keys of the UNet's `config.json` that this port uses."""

    sample_size: int | tuple[int, ...] | None = None
    out_channels: int = 4
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "UNetConfig":
        """Reads `config.json`; a `sample_size` below 64 from diffusers before 0.9 means 64, as in its pipelines."""
        size, version = raw.get("sample_size"), re.match(r"0\.(\d+)\.", str(raw.get("_diffusers_version", "")))
        if version and int(version[1]) < 9 and isinstance(size, int) and size < _OLD_SAMPLE_SIZE:
            warnings.warn(
                f"the UNet's config.json has sample_size={size}, written by diffusers {raw['_diffusers_version']}; "
                f"diffusers before 0.9 meant {_OLD_SAMPLE_SIZE} by it, so {_OLD_SAMPLE_SIZE} is used",
                stacklevel=2,
            )
            raw = raw | {"sample_size": _OLD_SAMPLE_SIZE}
        return super().from_dict(raw)

    def __post_init__(self):
        size = (self.sample_size,) * 2 if isinstance(self.sample_size, int) else self.sample_size
        if size is not None and (len(size) != 2 or min(size) < 1):
            raise ValueError(f"config.json: sample_size={self.sample_size} is not supported; use one side, or two")
        super().__post_init__()
        self.check_types("up_block_types", ("CrossAttnUpBlock2D", "UpBlock2D"))


def timestep_embedding(
    tau: Timestep, features: int, flip_sin_to_cos: bool, shift: float
) -> Float[Array, "B {features}"]:
    """Sinusoids of the timestep `tau` (real-valued) at `features`/2 frequencies, float32."""
    half = features // 2
    frequency = jnp.exp(-math.log(10000) * jnp.arange(half, dtype=jnp.float32) / (half - shift))
    angle = tau.astype(jnp.float32)[:, None] * frequency
    pair = (jnp.cos(angle), jnp.sin(angle)) if flip_sin_to_cos else (jnp.sin(angle), jnp.cos(angle))
    return jnp.concatenate(pair, axis=-1)


class TimestepEmbedding(nnx.Module):
    """Two linear layers with SiLU between, applied to the sinusoids."""

    def __init__(self, inputs: int, outputs: int, factory: LayerFactory):
        self.linear_1 = factory.linear(inputs, outputs)
        self.linear_2 = factory.linear(outputs, outputs)

    def __call__(self, x):
        return self.linear_2(jax.nn.silu(self.linear_1(x)))


def _resnet(config: EncoderConfig, inputs: int, outputs: int, factory: LayerFactory) -> ResnetBlock2D:
    time_features = 4 * config.block_out_channels[0]
    return ResnetBlock2D(inputs, outputs, config.norm_num_groups, config.norm_eps, factory, time_features)


def _transformer(config: EncoderConfig, channels: int, heads: int, factory: LayerFactory) -> Transformer2DModel:
    return Transformer2DModel(
        channels,
        config.cross_attention_dim,
        heads,
        config.transformer_layers_per_block,
        config.norm_num_groups,
        config.use_linear_projection,
        factory,
    )


class DownBlock2D(nnx.Module):
    """Residual blocks, each followed by a transformer if the config has one, then halving."""

    def __init__(self, config: EncoderConfig, i: int, factory: LayerFactory):
        channels = config.block_out_channels
        widths = [channels[max(i - 1, 0)]] + [channels[i]] * config.layers_per_block
        self.resnets = nnx.List([_resnet(config, a, b, factory) for a, b in itertools.pairwise(widths)])
        if config.down_block_types[i].startswith("CrossAttn"):
            self.attentions = nnx.List(
                [_transformer(config, channels[i], config.heads[i], factory) for _ in self.resnets]
            )
        if i + 1 < len(channels):
            self.downsamplers = nnx.List([Downsample2D(channels[i], config.downsample_padding, factory)])

    def __call__(self, x, time, context):
        """Returns the result and the list of all features that `UpBlock2D` takes as skips."""
        skips = []
        for j, resnet in enumerate(self.resnets):
            x = resnet(x, time)
            if hasattr(self, "attentions"):
                x = self.attentions[j](x, context)
            skips.append(x)
        if hasattr(self, "downsamplers"):
            x = self.downsamplers[0](x)
            skips.append(x)
        return x, skips


class UNetMidBlock2DCrossAttn(nnx.Module):
    def __init__(self, config: EncoderConfig, factory: LayerFactory):
        channels = config.block_out_channels[-1]
        self.resnets = nnx.List([_resnet(config, channels, channels, factory) for _ in range(2)])
        self.attentions = nnx.List([_transformer(config, channels, config.heads[-1], factory)])

    def __call__(self, x, time, context):
        x = self.attentions[0](self.resnets[0](x, time), context)
        return self.resnets[1](x, time)


class UpBlock2D(nnx.Module):
    """Residual blocks on features joined with skips, transformers if the config has them, then enlargement."""

    def __init__(self, config: UNetConfig, i: int, factory: LayerFactory):
        channels, heads = config.block_out_channels[::-1], config.heads[::-1]
        layers = config.layers_per_block + 1
        inputs = [channels[max(i - 1, 0)]] + [channels[i]] * (layers - 1)
        skips = [channels[i]] * (layers - 1) + [channels[min(i + 1, len(channels) - 1)]]
        self.resnets = nnx.List(
            [_resnet(config, a + b, channels[i], factory) for a, b in zip(inputs, skips, strict=True)]
        )
        if config.up_block_types[i].startswith("CrossAttn"):
            self.attentions = nnx.List([_transformer(config, channels[i], heads[i], factory) for _ in range(layers)])
        if i + 1 < len(channels):
            self.upsamplers = nnx.List([Upsample2D(channels[i], factory)])

    def __call__(self, x, skips: list, time, context):
        """Pops its skips from the end of `skips` and enlarges to the next skip's size: odd latent sizes work."""
        for j, resnet in enumerate(self.resnets):
            x = resnet(jnp.concatenate([x, skips.pop()], axis=-1), time)
            if hasattr(self, "attentions"):
                x = self.attentions[j](x, context)
        if hasattr(self, "upsamplers"):
            x = self.upsamplers[0](x, skips[-1].shape[1:3])
        return x


class UNetEncoder(Remat, net.Model):
    """The UNet up to its middle block, of which a ControlNet is a copy."""

    layout: ClassVar = hub.Layout()

    def __init__(self, config: EncoderConfig, factory: LayerFactory, *, conv_in: bool = True):
        channels = config.block_out_channels
        self.config, self.dtype = config, factory.dtype
        if conv_in:
            self.conv_in = factory.conv(config.in_channels, channels[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(channels[0], 4 * channels[0], factory)
        self.down_blocks = nnx.List([DownBlock2D(config, i, factory) for i in range(len(channels))])
        self.mid_block = UNetMidBlock2DCrossAttn(config, factory)

    def _encode(self, sample, timestep, encoder_hidden_states, condition=None):
        """The features behind the middle block, the skips, and the embeddings of timestep and text.

        `condition` is added to the output of `conv_in`.
        """
        config = self.config
        tau = jnp.broadcast_to(jnp.asarray(timestep), sample.shape[:1])
        sinusoids = timestep_embedding(tau, config.block_out_channels[0], config.flip_sin_to_cos, config.freq_shift)
        time = self.time_embedding(sinusoids.astype(self.dtype))
        text = encoder_hidden_states.astype(self.dtype)
        x = sample.astype(self.dtype)
        x = self.conv_in(x) if hasattr(self, "conv_in") else x
        x = x if condition is None else x + condition
        skips = [x]
        for block in self.down_blocks:
            x, block_skips = block(x, time, text)
            skips += block_skips
        return self.mid_block(x, time, text), skips, time, text


class UNet2DConditionModel(UNetEncoder):
    """Stable Diffusion's network: latents, timestep and text → noise, velocity or data, depending on its training.

    `StackedUNet` builds it without `conv_in`, or without `conv_out` and perhaps `conv_norm_out`. It then takes, or
    returns, features [B, H, W, block_out_channels[0]].
    """

    Config: ClassVar = UNetConfig

    def __init__(
        self,
        config: UNetConfig,
        factory: LayerFactory,
        *,
        conv_in: bool = True,
        norm: bool = True,
        conv_out: bool = True,
    ):
        super().__init__(config, factory, conv_in=conv_in)
        channels = config.block_out_channels
        self.up_blocks = nnx.List([UpBlock2D(config, i, factory) for i in range(len(channels))])
        if norm:
            self.conv_norm_out = factory.group_norm(channels[0], config.norm_num_groups, config.norm_eps)
        if conv_out:
            self.conv_out = factory.conv(channels[0], config.out_channels, 3, padding=1)

    def __call__(
        self,
        sample: Latent,
        timestep: Timestep | Real[AnyArray, ""] | float,
        encoder_hidden_states: Float[AnyArray, "B L D"],
        down_block_additional_residuals: Sequence[Features] | None = None,
        mid_block_additional_residual: Features | None = None,
    ) -> Float[Array, "B H W out"]:
        """The network's output, in float32 for every compute type.

        Args:
          sample: latents [B, H, W, in_channels].
          timestep: integer or real; a flow passes 1000·(1−t).
          encoder_hidden_states: text [B, L, cross_attention_dim].
          down_block_additional_residuals: what ControlNets add to each skip, that of `conv_in` first.
          mid_block_additional_residual: what they add to the middle block's output.

        Raises:
          ValueError: the number of residuals is not that of the skips.
        """
        x, skips, time, text = self._encode(sample, timestep, encoder_hidden_states)
        if down_block_additional_residuals is not None:
            both = zip(skips, down_block_additional_residuals, strict=True)
            skips = [skip + residual.astype(skip.dtype) for skip, residual in both]
        if mid_block_additional_residual is not None:
            x = x + mid_block_additional_residual.astype(x.dtype)
        return self._decode(x, skips, time, text)

    def with_middle(self, sample, timestep, encoder_hidden_states) -> tuple[Float[Array, "B H W out"], Middle]:
        """The network's output, and the features of `middle` on the way to it."""
        x, skips, time, text = self._encode(sample, timestep, encoder_hidden_states)
        return self._decode(x, skips, time, text), x.astype(jnp.float32)

    def middle(self, sample, timestep, encoder_hidden_states) -> Middle:
        """The features behind the middle block, in float32: what a discriminator looks at."""
        return self._encode(sample, timestep, encoder_hidden_states)[0].astype(jnp.float32)

    def _decode(self, x, skips, time, text):
        for block in self.up_blocks:
            x = block(x, skips, time, text)
        return self.maybe_checkpoint(self._out)(x)

    def _out(self, x):
        x = jax.nn.silu(self.conv_norm_out(x)) if hasattr(self, "conv_norm_out") else x
        x = self.conv_out(x) if hasattr(self, "conv_out") else x
        return x.astype(jnp.float32)
