"""The Stacked U-Net of InstaFlow-1.7B for PyTorch diffusers: two U-Nets in series; see the model card beside unet/."""

from diffusers import ConfigMixin, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import nn


class StackedUNet(ModelMixin, ConfigMixin):
    """Two `UNet2DConditionModel` without the first one's `conv_out` and the second one's `conv_in`.

    Takes what `StableDiffusionPipeline` passes to its U-Net. All but `middle_norm` are `UNet2DConditionModel`'s fields;
    `middle_norm` keeps the first one's `conv_norm_out` and SiLU.
    """

    @register_to_config
    def __init__(
        self,
        sample_size=None,
        in_channels=4,
        out_channels=4,
        flip_sin_to_cos=True,
        freq_shift=0,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        block_out_channels=(320, 640, 1280, 1280),
        layers_per_block=2,
        downsample_padding=1,
        norm_num_groups=32,
        norm_eps=1e-5,
        cross_attention_dim=1280,
        transformer_layers_per_block=1,
        attention_head_dim=8,
        num_attention_heads=None,
        use_linear_projection=False,
        time_cond_proj_dim=None,
        middle_norm=True,
    ):
        super().__init__()
        fields = {k: v for k, v in self.config.items() if k != "middle_norm" and not k.startswith("_")}
        first, second = UNet2DConditionModel(**fields), UNet2DConditionModel(**fields)
        first.conv_out, second.conv_in = nn.Identity(), nn.Identity()
        if not middle_norm:
            first.conv_norm_out = None
        self.halves = nn.ModuleList([first, second])

    def forward(
        self,
        sample,
        timestep,
        encoder_hidden_states,
        timestep_cond=None,
        cross_attention_kwargs=None,
        added_cond_kwargs=None,
        return_dict=True,
    ):
        for half in self.halves:
            sample = half(
                sample,
                timestep,
                encoder_hidden_states,
                timestep_cond=timestep_cond,
                cross_attention_kwargs=cross_attention_kwargs,
                added_cond_kwargs=added_cond_kwargs,
            ).sample
        return UNet2DConditionOutput(sample) if return_dict else (sample,)
