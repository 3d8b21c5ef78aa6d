"""ControlNets of `sample` and `serve`: the field `config.controls`, their weights, and condition images."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from instaflow_jax import pipeline
from instaflow_jax.arrays import Params
from instaflow_jax.infra import images, stores
from instaflow_jax.models import controlnet
from instaflow_jax.models.controlnet import ControlNetModel
from instaflow_jax.models.net import Net
from instaflow_jax.models.unet import EncoderConfig
from instaflow_jax.stages.common.loading import WeightOptions, check_files, check_finite, network_options, read_scales
from instaflow_jax.weights import ldm

# Fields that a ControlNet must share with its U-Net, so that its residuals have the shapes of the skips.
_SHARED = ("in_channels", "block_out_channels", "layers_per_block", "cross_attention_dim")
ImageFile = UInt8[np.ndarray, "_ _ 3"]  # of any size
Condition = Float[np.ndarray, "1 H W 3"]  # in [0, 1], as ControlNets are given it


@dataclasses.dataclass(frozen=True)
class Control:
    """A ControlNet.

    Attributes:
      source: where it came from.
      scale: factor of its residuals.
    """

    source: str
    net: Net
    params: Params
    scale: float


def load_controls(controls: str, pipe: pipeline.Pipeline, options: WeightOptions) -> tuple[Control, ...]:
    """The ControlNets of `config.controls` ('DIR=0.8|FILE.safetensors'), checked to fit the pipeline's U-Net.

    Raises:
      ValueError, FileNotFoundError: naming the file and what is wrong with it.
    """
    loaded = []
    for source, scale in read_scales("controls", controls):
        if options.verify:
            check_files(source)
        net, params = _load(source, pipe.nets["unet"], options)
        check_finite(source, params)
        loaded.append(Control(source, net, params, scale))
        check_fit(loaded[-1], pipe)
    return tuple(loaded)


def _load(source: str, unet: Net, options: WeightOptions) -> tuple[Net, Params]:
    """From a directory or hub id in diffusers layout, or from one file, whose config is the U-Net's.

    Where there are no files of `config.weights_variant`, the usual ones are read.
    """
    keywords = network_options(options)
    if Path(source).suffix not in pipeline.SINGLE_FILES:
        try:
            return ControlNetModel.from_pretrained(source, variant=options.weights_variant or None, **keywords)
        except FileNotFoundError:
            if not options.weights_variant:
                raise
        return ControlNetModel.from_pretrained(source, **keywords)
    stored, channels = ldm.open_control(stores.local(source))
    net = ControlNetModel.from_config(config_from_unet(unet, channels), **keywords)
    return net, ldm.fill_control(stored, net.config, net.shapes, source)


def config_from_unet(unet: Net, channels: tuple[int, ...]) -> dict[str, Any]:
    """The `config.json` of a ControlNet for this U-Net; `channels` are its `conditioning_embedding_out_channels`."""
    shared = {field.name: getattr(unet.config, field.name) for field in dataclasses.fields(EncoderConfig)}
    return shared | {"conditioning_embedding_out_channels": channels}


def check_fit(control: Control, pipe: pipeline.Pipeline) -> None:
    """Raises ValueError if the ControlNet was made for a U-Net of another width, or for images of another size."""
    source, mine, unet = control.source, control.net.config, pipe.nets["unet"].config
    for name in _SHARED:
        if getattr(mine, name) != getattr(unet, name):
            raise ValueError(
                f"{source}: this ControlNet has {name}={getattr(mine, name)}, but the U-Net has "
                f"{getattr(unet, name)}; use a ControlNet that was made for this model"
            )
    factor = pipe.nets["vae"].config.factor
    if mine.factor != factor:
        raise ValueError(
            f"{source}: this ControlNet takes images {mine.factor} times as large as the latents, but the autoencoder "
            f"makes images {factor} times as large; use a ControlNet that was made for this model"
        )


# ---------------------------------------------------------------- condition images


def read_conditions(conditions: str, controls: Sequence[Control]) -> list[ImageFile]:
    """The images of `config.conditions` ('a.png|b.jpg'), one for each ControlNet in their order.

    Raises:
      ValueError, FileNotFoundError: there are more or fewer images than ControlNets, or one is not readable.
    """
    files = [file.strip() for file in conditions.split("|") if file.strip()]
    if len(files) != len(controls):
        raise ValueError(
            f"config.conditions={conditions!r} names {len(files)} images, but config.controls names {len(controls)} "
            "ControlNets; write one image for each, separated by |"
        )
    return [images.load_rgb(stores.local(file)) for file in files]


def to_condition(image: ImageFile, height: int, width: int) -> Condition:
    """What a ControlNet is given for an image: resized to the pixels that the model draws, in [0, 1]."""
    return images.resize(image, height, width)[None].astype(np.float32) / 255


# ---------------------------------------------------------------- the U-Net with its ControlNets


def make_apply(pipe: pipeline.Pipeline, controls: Sequence[Control]) -> Callable:
    """The network that `sampling.make_solve` integrates; its parameters are those of `inference_params`."""
    unet = pipe.nets["unet"]
    return controlnet.make_apply(unet, [control.net for control in controls]) if controls else unet.apply


def inference_params(
    pipe: pipeline.Pipeline, controls: Sequence[Control], conditions: Sequence[Condition]
) -> dict[str, dict[str, Any]]:
    """`pipeline.inference_params`, with the ControlNets, their scales and condition images beside the U-Net's weights.

    The images are arrays like the weights, so one compiled program serves all images.
    """
    params = pipeline.inference_params(pipe.nets, pipe.params)
    if not controls:
        return params
    parts = [
        {"params": control.net.cast(dict(control.params)), "condition": image, "scale": np.float32(control.scale)}
        for control, image in zip(controls, conditions, strict=True)
    ]
    return params | {"unet": {"unet": params["unet"], "controls": parts}}


def with_conditions(params: Mapping[str, Any], conditions: Sequence[Condition]) -> Mapping[str, Any]:
    """The parameters of `inference_params` with other condition images; unchanged without any."""
    if not conditions:
        return params
    both = zip(params["unet"]["controls"], conditions, strict=True)
    return params | {"unet": params["unet"] | {"controls": [part | {"condition": image} for part, image in both]}}
