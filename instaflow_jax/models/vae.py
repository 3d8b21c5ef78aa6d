"""Stable Diffusion's autoencoder between pixels and latents, with diffusers' class and attribute names."""

import dataclasses
import re
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from instaflow_jax.arrays import AnyArray, Latent
from instaflow_jax.models import net
from instaflow_jax.models.blocks import Downsample2D, ResnetBlock2D, Upsample2D
from instaflow_jax.models.layers import LayerFactory, Remat, attend
from instaflow_jax.weights import hub

Pixels = Float[AnyArray, "B height width channels"]
_EPS = 1e-6  # for every GroupNorm of the autoencoder; the UNet's residual blocks have 1e-5


@dataclasses.dataclass(frozen=True)
class VAEConfig(net.Config):
    """The keys of the autoencoder's `config.json` that this port uses; see diffusers' `AutoencoderKL`.

    `scaling_factor` · z has unit variance; all other code works with these scaled latents.
    """

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int | tuple[int, ...] | None = 32
    scaling_factor: float = 0.18215

    fixed: ClassVar[dict[str, Any]] = {
        "act_fn": "silu",
        "shift_factor": None,
        "latents_mean": None,
        "latents_std": None,
        "use_quant_conv": True,
        "use_post_quant_conv": True,
        "mid_block_add_attention": True,
    }

    def __post_init__(self):
        if not self.block_out_channels:
            raise ValueError("config.json: block_out_channels=[] is not supported; use the channels of each block")
        for field, allowed in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            types = getattr(self, field)
            if types != (allowed,) * len(self.block_out_channels):
                raise ValueError(
                    f"config.json: {field}={list(types)} must name {allowed!r} once for each of "
                    f"block_out_channels={list(self.block_out_channels)}"
                )

    @property
    def factor(self) -> int:
        """Pixels per latent in each direction (8 in Stable Diffusion)."""
        return 2 ** (len(self.block_out_channels) - 1)


class VAEAttention(Remat):
    """Self-attention with one head over all pixels of [B, H, W, C], added to its input."""

    remat: ClassVar = ("attention", "blocks")

    def __init__(self, channels: int, groups: int, factory: LayerFactory):
        self.group_norm = factory.group_norm(channels, groups, _EPS)
        self.to_q, self.to_k, self.to_v = (factory.linear(channels, channels) for _ in range(3))
        self.to_out = nnx.List([factory.linear(channels, channels)])
        self.implementation, self.kernels = factory.attention, factory.kernels

    def __call__(self, x):
        h = self.group_norm(x).reshape(x.shape[0], -1, x.shape[-1])
        run = self.maybe_checkpoint(lambda q, k, v: attend(q, k, v, 1, self.implementation, self.kernels))
        h = run(self.to_q(h), self.to_k(h), self.to_v(h))
        return x + self.to_out[0](h).reshape(x.shape)


class MidBlock(nnx.Module):
    def __init__(self, channels: int, groups: int, factory: LayerFactory):
        self.resnets = nnx.List([ResnetBlock2D(channels, channels, groups, _EPS, factory) for _ in range(2)])
        self.attentions = nnx.List([VAEAttention(channels, groups, factory)])

    def __call__(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


def _resnets(inputs: int, outputs: int, count: int, groups: int, factory: LayerFactory) -> list[ResnetBlock2D]:
    return [ResnetBlock2D(outputs if j else inputs, outputs, groups, _EPS, factory) for j in range(count)]


class DownEncoderBlock2D(nnx.Module):
    """Residual blocks, then halving in all blocks but the last; it pads right and bottom only, like the reference."""

    def __init__(self, inputs: int, outputs: int, count: int, groups: int, last: bool, factory: LayerFactory):
        self.resnets = nnx.List(_resnets(inputs, outputs, count, groups, factory))
        if not last:
            self.downsamplers = nnx.List([Downsample2D(outputs, ((0, 1), (0, 1)), factory)])

    def __call__(self, x):
        for resnet in self.resnets:
            x = resnet(x)
        return self.downsamplers[0](x) if hasattr(self, "downsamplers") else x


class UpDecoderBlock2D(nnx.Module):
    """Residual blocks, then twofold enlargement in all blocks but the last."""

    def __init__(self, inputs: int, outputs: int, count: int, groups: int, last: bool, factory: LayerFactory):
        self.resnets = nnx.List(_resnets(inputs, outputs, count, groups, factory))
        if not last:
            self.upsamplers = nnx.List([Upsample2D(outputs, factory)])

    def __call__(self, x):
        for resnet in self.resnets:
            x = resnet(x)
        return self.upsamplers[0](x) if hasattr(self, "upsamplers") else x


class Encoder(nnx.Module):
    def __init__(self, config: VAEConfig, factory: LayerFactory):
        c, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = factory.conv(config.in_channels, c[0], 3, padding=1)
        self.down_blocks = nnx.List(
            [
                DownEncoderBlock2D(c[max(i - 1, 0)], c[i], config.layers_per_block, groups, i + 1 == len(c), factory)
                for i in range(len(c))
            ]
        )
        self.mid_block = MidBlock(c[-1], groups, factory)
        self.conv_norm_out = factory.group_norm(c[-1], groups, _EPS)
        self.conv_out = factory.conv(c[-1], 2 * config.latent_channels, 3, padding=1)

    def __call__(self, x):
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(Remat):
    def __init__(self, config: VAEConfig, factory: LayerFactory):
        c, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = factory.conv(config.latent_channels, c[0], 3, padding=1)
        self.mid_block = MidBlock(c[0], groups, factory)
        self.up_blocks = nnx.List(
            [
                UpDecoderBlock2D(c[max(i - 1, 0)], c[i], config.layers_per_block + 1, groups, i + 1 == len(c), factory)
                for i in range(len(c))
            ]
        )
        self.conv_norm_out = factory.group_norm(c[-1], groups, _EPS)
        self.conv_out = factory.conv(c[-1], config.out_channels, 3, padding=1)

    def __call__(self, z):
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.maybe_checkpoint(self._out)(x)

    def _out(self, x):
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


# Old files and the old Flax class use these names for the layers of `VAEAttention`.
_MODERN_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_NAMES = {new: old for old, new in _MODERN_NAMES.items()}


def modernize_key(key: str) -> str:
    """`….attentions.0.query.weight` → `….attentions.0.to_q.weight`; other keys stay."""
    return re.sub(r"\.(query|key|value|proj_attn)(?=\.\w+$)", lambda match: "." + _MODERN_NAMES[match[1]], key)


def to_flax_name(name: str) -> str:
    """The inverse of `modernize_key`."""
    return re.sub(r"\.(to_q|to_k|to_v|to_out\.0)(?=\.\w+$)", lambda match: "." + _OLD_NAMES[match[1]], name)


class AutoencoderKL(net.Model):
    """Pixels [B, H, W, 3] in [−1, 1] ⇄ latents [B, H/f, W/f, latent_channels] of unit variance."""

    Config: ClassVar = VAEConfig
    layout: ClassVar = hub.Layout(rename_key=modernize_key, to_flax_name=to_flax_name)

    def __init__(self, config: VAEConfig, factory: LayerFactory):
        n = config.latent_channels
        self.config, self.dtype = config, factory.dtype
        self.encoder = Encoder(config, factory)
        self.decoder = Decoder(config, factory)
        self.quant_conv = factory.conv(2 * n, 2 * n, 1)
        self.post_quant_conv = factory.conv(n, n, 1)

    def moments(self, pixels: Pixels) -> tuple[Latent, Latent]:
        """Mean and log-variance of the latents' Gaussian, before scaling; each [B, h, w, latent_channels]."""
        moments = self.quant_conv(self.encoder(pixels.astype(self.dtype))).astype(jnp.float32)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def encode(self, pixels: Pixels, eps: Latent | None = None) -> Latent:
        """Pixels → scaled latents: the Gaussian's mean, or a sample of it from standard normal `eps` [B, h, w, c]."""
        z, logvar = self.moments(pixels)
        if eps is not None:
            z = z + jnp.exp(0.5 * logvar) * eps
        return z * self.config.scaling_factor

    def decode(self, latents: Latent) -> Pixels:
        """Scaled latents → pixels, not clipped."""
        z = (latents / self.config.scaling_factor).astype(self.dtype)
        return self.decoder(self.post_quant_conv(z)).astype(jnp.float32)

    def __call__(self, pixels: Pixels) -> Pixels:
        return self.decode(self.encode(pixels))
