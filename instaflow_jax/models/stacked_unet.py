"""The Stacked U-Net of InstaFlow-1.7B: two U-Nets of Stable Diffusion in series, trained together."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from flax import nnx
from jaxtyping import Array, Float, Real

from instaflow_jax.arrays import AnyArray, Latent, Params, Timestep
from instaflow_jax.models import net
from instaflow_jax.models.layers import LayerFactory
from instaflow_jax.models.unet import Features, UNet2DConditionModel, UNetConfig
from instaflow_jax.weights import hub


@dataclasses.dataclass(frozen=True)
class StackedUNetConfig(UNetConfig):
    """The config of each half, and what the paper leaves open.

    `middle_norm` keeps half 1's `conv_norm_out` and its SiLU before half 2. Default: kept, so that only the two
    convolutions are gone.
    """

    middle_norm: bool = True

    @property
    def half(self) -> UNetConfig:
        """The config of one half."""
        return UNetConfig(**{field.name: getattr(self, field.name) for field in dataclasses.fields(UNetConfig)})


class StackedUNet(net.Model):
    """Two U-Nets in series without the first one's `conv_out` and the second one's `conv_in` (paper, appendix).

    The features that half 1 passes on are half 2's first skip; no other skip joins the halves. Each half has its own
    weights, its own time embedding and its own attention to the text; both see the same timestep and text. It is called
    as `UNet2DConditionModel` is, and has that class's parameters under `halves.0` and `halves.1`.

    Each half starts as a U-Net of its own, so each gets all residuals of a ControlNet that was made for one. The first
    residual belongs to the output of `conv_in`; in half 2, which has none, it is added to the features from half 1,
    which are its first skip. Nobody has published a ControlNet for this network, so this is our choice.
    """

    Config: ClassVar = StackedUNetConfig
    layout: ClassVar = hub.Layout()
    torch_code: ClassVar = Path(__file__).parents[1] / "assets" / "stacked_unet.py"

    def __init__(self, config: StackedUNetConfig, factory: LayerFactory):
        self.config = config
        self.halves = nnx.List(
            [
                UNet2DConditionModel(config, factory, norm=config.middle_norm, conv_out=False),
                UNet2DConditionModel(config, factory, conv_in=False),
            ]
        )

    def __call__(
        self,
        sample: Latent,
        timestep: Timestep | Real[AnyArray, ""] | float,
        encoder_hidden_states: Float[AnyArray, "B L D"],
        down_block_additional_residuals: Sequence[Features] | None = None,
        mid_block_additional_residual: Features | None = None,
    ) -> Float[Array, "B H W out"]:
        """See `UNet2DConditionModel.__call__`; both halves get the same residuals."""
        residuals = down_block_additional_residuals, mid_block_additional_residual
        features = self.halves[0](sample, timestep, encoder_hidden_states, *residuals)
        return self.halves[1](features, timestep, encoder_hidden_states, *residuals)


def stack_net(unet: net.Net, middle_norm: bool, **options) -> net.Net:
    """The network of two halves like `unet`; `options` are `Model.from_config`'s."""
    fields = dataclasses.asdict(unet.config) | {"middle_norm": middle_norm}
    return StackedUNet.from_config(fields, **options)


def stack_params(stacked: net.Net, first: Params, second: Params) -> dict[str, AnyArray]:
    """The weights of `stacked` to start from: those of two U-Nets, or of one given twice, without what falls away."""
    both = {f"halves.{i}.{name}": weight for i, half in enumerate((first, second)) for name, weight in half.items()}
    return {name: both[name] for name in stacked.shapes}
