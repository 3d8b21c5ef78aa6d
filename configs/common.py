"""What the configs of several stages share."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict


def pick(variants: Mapping[str, Any], name: str) -> Any:
    """The variant called `name` (after the colon in --config=FILE:name), or a ValueError that lists what there is."""
    if name not in variants:
        raise ValueError(f"this config has no variant {name!r}; it has {', '.join(variants)}")
    return variants[name]


SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"


def weights() -> ConfigDict:
    """Whose weights a stage reads, and how it computes with them."""
    config = ConfigDict()
    config.model = ""  # embedded name, directory or hub id in diffusers layout, or one .safetensors or .ckpt file
    config.base = SD15  # where a single file's configs, tokenizer and scheduler come from: a directory or hub id
    config.delta = {"custom": "", "origin": SD15, "scale": 1.0}  # adds scale · (custom − origin); "" adds nothing
    config.loras = ""  # FILE=0.8|FILE2=0.5, merged one after the other
    config.weights_variant = ""  # "fp16" reads model.fp16.safetensors and the like
    config.dtype = "float32"  # or bfloat16, the type products are computed in
    config.attention = "xla"  # or cudnn (NVIDIA, bfloat16)
    config.kernels = "auto"  # or xla, which turns every hand-written kernel off
    return config


def solving() -> ConfigDict:
    """`weights`, and how noise becomes latents."""
    config = weights()
    config.dynamics = "auto"  # flow or teacher, where the directory does not say it right
    config.solver = "auto"  # teacher: dpm_solver, ddim; flow: euler, heun; auto takes the first
    config.N = 25  # steps
    config.alpha = 1.0  # guidance; 1 is none
    config.negative = ""  # negative prompt; needs alpha > 1
    config.height = 0  # pixels; 0 is the size the model was made for
    config.width = 0
    return config
