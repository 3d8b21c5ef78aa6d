"""ControlNets (arXiv 2302.05543) for Stable Diffusion 1.x and 2.x, with diffusers' class and attribute names.

A ControlNet is a copy of the UNet up to its middle block that also sees a condition image. What it computes is added to
the UNet's skips and to the output of its middle block.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Real

from instaflow_jax.arrays import AnyArray, Key, Latent, Params, Scalar, Timestep
from instaflow_jax.models.layers import LayerFactory
from instaflow_jax.models.net import Net
from instaflow_jax.models.unet import EncoderConfig, Features, UNetEncoder

_ZERO = ("controlnet_down_blocks.", "controlnet_mid_block.", "controlnet_cond_embedding.conv_out.")
CONDITION_CHANNELS = (16, 32, 96, 256)  # of the published ControlNets; each after the first halves the image
Residuals = tuple[list[Features], Features]  # for the skips, and for the middle block


@dataclasses.dataclass(frozen=True)
class ControlNetConfig(EncoderConfig):
    """The keys of a ControlNet's `config.json` that this port uses; see diffusers' `ControlNetModel`."""

    conditioning_embedding_out_channels: tuple[int, ...] = CONDITION_CHANNELS
    controlnet_conditioning_channel_order: str = "rgb"

    fixed: ClassVar[dict[str, Any]] = EncoderConfig.fixed | {
        "conditioning_channels": 3,
        "global_pool_conditions": False,  # of the shuffle model, which steers half of a guided batch
    }

    def __post_init__(self):
        super().__post_init__()
        if not self.conditioning_embedding_out_channels:
            raise ValueError("config.json: conditioning_embedding_out_channels=[] is not supported; use one or more")
        if self.controlnet_conditioning_channel_order not in ("rgb", "bgr"):
            raise ValueError(
                f"config.json: controlnet_conditioning_channel_order={self.controlnet_conditioning_channel_order!r} "
                "is not supported; use 'rgb' or 'bgr'"
            )

    @property
    def factor(self) -> int:
        """Pixels of the condition image along one side of a latent."""
        return 2 ** (len(self.conditioning_embedding_out_channels) - 1)


class ControlNetConditioningEmbedding(nnx.Module):
    """Convolutions with SiLU between, which bring the image to the latents' size: [B, H, W, 3] → [B, h, w, outputs]."""

    def __init__(self, outputs: int, channels: tuple[int, ...], factory: LayerFactory):
        self.conv_in = factory.conv(3, channels[0], 3, padding=1)
        self.blocks = nnx.List([])
        for narrow, wide in itertools.pairwise(channels):
            self.blocks.append(factory.conv(narrow, narrow, 3, padding=1))
            self.blocks.append(factory.conv(narrow, wide, 3, stride=2, padding=1))
        self.conv_out = factory.conv(channels[-1], outputs, 3, padding=1)

    def __call__(self, image):
        x = jax.nn.silu(self.conv_in(image))
        for block in self.blocks:
            x = jax.nn.silu(block(x))
        return self.conv_out(x)


class ControlNetModel(UNetEncoder):
    """Latents, timestep, text and a condition image → what the UNet adds to its skips and its middle block."""

    Config: ClassVar = ControlNetConfig

    def __init__(self, config: ControlNetConfig, factory: LayerFactory):
        super().__init__(config, factory)
        channels = config.block_out_channels
        self.controlnet_cond_embedding = ControlNetConditioningEmbedding(
            channels[0], config.conditioning_embedding_out_channels, factory
        )
        skips = [channels[0]]
        for i, width in enumerate(channels):
            skips += [width] * (config.layers_per_block + (i + 1 < len(channels)))
        self.controlnet_down_blocks = nnx.List([factory.conv(width, width, 1) for width in skips])
        self.controlnet_mid_block = factory.conv(channels[-1], channels[-1], 1)

    def __call__(
        self,
        sample: Latent,
        timestep: Timestep | Real[AnyArray, ""] | float,
        encoder_hidden_states: Float[AnyArray, "B L D"],
        controlnet_cond: Float[AnyArray, "#B height width 3"],
        conditioning_scale: Scalar | float = 1.0,
    ) -> Residuals:
        """The residuals, in the compute type.

        Args:
          sample, timestep, encoder_hidden_states: what the UNet is given.
          controlnet_cond: condition images in [0, 1], `config.factor` times as large as the latents; one for all
            samples, or one for each.
          conditioning_scale: factor of all residuals.
        """
        rgb = self.config.controlnet_conditioning_channel_order == "rgb"
        image = controlnet_cond if rgb else controlnet_cond[..., ::-1]
        condition = self.controlnet_cond_embedding(image.astype(self.dtype))
        x, skips, _, _ = self._encode(sample, timestep, encoder_hidden_states, condition)
        down = [block(skip) for block, skip in zip(self.controlnet_down_blocks, skips, strict=True)]
        return jax.tree.map(lambda r: (r * conditioning_scale).astype(r.dtype), (down, self.controlnet_mid_block(x)))


def make_apply(unet: Net, controls: Sequence[Net]) -> Callable:
    """A UNet with ControlNets, called as the UNet alone: `apply(params, sample, timestep, encoder_hidden_states)`.

    `params` holds the UNet's weights as "unet" and, as "controls", for each ControlNet its weights "params", the image
    "condition" in [0, 1], and the scalar "scale". There is one image for all samples, or one for each; a guided batch,
    which holds each sample twice in a row, takes them so too. The residuals of several ControlNets are added up.
    """

    def apply(params: Mapping[str, Any], sample, timestep, encoder_hidden_states):
        inputs = sample, timestep, encoder_hidden_states
        residuals = [
            net.apply(control["params"], *inputs, _fit_batch(control["condition"], len(sample)), control["scale"])
            for net, control in zip(controls, params["controls"], strict=True)
        ]
        total = jax.tree.map(lambda *parts: sum(parts[1:], parts[0]), *residuals) if residuals else (None, None)
        return unet.apply(params["unet"], *inputs, *total)

    return apply


def _fit_batch(condition: Float[AnyArray, "b H W 3"], count: int) -> Float[AnyArray, "_ H W 3"]:
    """The images of a batch of `count` samples; a single one is left as it is."""
    return condition if len(condition) == 1 else jnp.repeat(condition, count // len(condition), axis=0)


def init_from_unet(control: Net, unet: Params, key: Key) -> Params:
    """Weights to train from: the UNet's encoder, and zeros where a ControlNet's output begins, so that it adds nothing.

    The convolutions that embed the condition image are random but for the last, which is zero.

    Args:
      unet: weights of a UNet of the same architecture.
    """
    drawn = control.init(key)
    start = {name: jnp.zeros_like(p) if name.startswith(_ZERO) else p for name, p in drawn.items()}
    return start | {name: jnp.asarray(unet[name]) for name in start if name in unet}
