"""The head that makes a U-Net a discriminator: features of its middle block → real or fake (DMD2, arXiv 2405.14867)."""

import dataclasses
from typing import ClassVar

import jax
from jaxtyping import Array, Float

from instaflow_jax.arrays import AnyArray
from instaflow_jax.models import net
from instaflow_jax.models.layers import LayerFactory
from instaflow_jax.weights import hub


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig(net.Config):
    """The middle block's channels, and the groups and eps of its norms."""

    channels: int = 1280
    norm_num_groups: int = 32
    norm_eps: float = 1e-5


class Discriminator(net.Model):
    """Halving convolution, norm, SiLU, a logit for each position, and their mean.

    DMD2's head has two halving convolutions, for 8×8 positions; the mean takes any number of them.
    """

    Config: ClassVar = DiscriminatorConfig
    layout: ClassVar = hub.Layout()

    def __init__(self, config: DiscriminatorConfig, factory: LayerFactory):
        self.conv = factory.conv(config.channels, config.channels, 3, stride=2, padding=1)
        self.norm = factory.group_norm(config.channels, config.norm_num_groups, config.norm_eps)
        self.conv_out = factory.conv(config.channels, 1, 1)

    def __call__(self, features: Float[AnyArray, "B h w D"]) -> Float[Array, " B"]:
        """The logit of "real" for each sample."""
        return self.conv_out(jax.nn.silu(self.norm(self.conv(features)))).mean((1, 2, 3))


def make_discriminator(unet: net.Net) -> net.Net:
    """The head for the middle block of a `UNet2DConditionModel`; it computes in float32."""
    config = unet.config
    fields = {"norm_num_groups": config.norm_num_groups, "norm_eps": config.norm_eps}
    return Discriminator.from_config({"channels": config.block_out_channels[-1], **fields})
