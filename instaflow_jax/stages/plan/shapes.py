"""Networks without weights: Stable Diffusion 1.5's, or those of a directory."""

from pathlib import Path
from typing import Any

from instaflow_jax import pipeline
from instaflow_jax.infra.files import read_json
from instaflow_jax.models.lpips import LPIPS, PUBLISHED
from instaflow_jax.models.net import Net

CLASSES = {**pipeline.NETWORKS, "lpips": LPIPS}
SD15: dict[str, dict[str, Any]] = {  # fields of the published config.json files that differ from the classes' defaults
    "unet": {"sample_size": 64, "cross_attention_dim": 768},
    "vae": {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "sample_size": 512,
    },
    "text_encoder": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
    },
    "lpips": PUBLISHED["vgg"],
}
PUBLISHED_SHAPES = {"sd15": SD15, "sd15_stacked": SD15 | {"unet": SD15["unet"] | {"_class_name": "StackedUNet"}}}
SD15_SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}


def read_configs(model: str) -> dict[str, dict[str, Any]]:
    """The config.json of each network.

    Args:
      model: "sd15", "sd15_stacked" (InstaFlow-1.7B's), an embedded name, or a directory in diffusers layout; without
        lpips/ it gets VGG16's.

    Raises:
      FileNotFoundError: there is no such directory, or it lacks a file.
    """
    if model in PUBLISHED_SHAPES:
        return PUBLISHED_SHAPES[model]
    folder = Path(pipeline.locate(model))
    if not folder.is_dir():
        raise FileNotFoundError(
            f"config.shapes={model!r} is neither 'sd15', 'sd15_stacked', an embedded model nor a directory"
        )
    has_trunk = (folder / "lpips").is_dir()
    found = {name: read_json(folder / name / "config.json") for name in CLASSES if name != "lpips" or has_trunk}
    return {"lpips": SD15["lpips"]} | found


def read_scheduler(model: str) -> dict[str, Any]:
    """The scheduler_config.json; `model` as in `read_configs`."""
    if model in PUBLISHED_SHAPES:
        return SD15_SCHEDULER
    return read_json(Path(pipeline.locate(model)) / "scheduler" / "scheduler_config.json")


def make_nets(configs: dict[str, dict[str, Any]], **options: Any) -> dict[str, Net]:
    """The networks that `configs` names; options as of `Model.from_config`."""
    classes = CLASSES | {"unet": pipeline.network_class("unet", configs["unet"].get("_class_name"))}
    return {name: classes[name].from_config(raw, **options) for name, raw in configs.items()}
