"""A whole Stable Diffusion on disk: the folders that `model_index.json` names, read and written together."""
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from instaflow_jax.arrays import Params
from instaflow_jax.infra import files
from instaflow_jax.models import hub
from instaflow_jax.models.clip import CLIPTextModel
from instaflow_jax.models.net import Net
from instaflow_jax.models.tokenizer import Tokenizer
from instaflow_jax.models.unet import UNet2DConditionModel
from instaflow_jax.models.vae import AutoencoderKL

EMBEDDED = Path(__file__).parent.parent / "assets"  # models that come with the package, by name
NETWORKS = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
_CLASSES = {name: (cls.__name__, "Flax" + cls.__name__) for name, cls in NETWORKS.items()}
_CLASSES |= {
    "_class_name": ("StableDiffusionPipeline", "FlaxStableDiffusionPipeline", "RectifiedFlowPipeline",
                    "InstaFlowPipeline"),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
}
_NOT_OURS = ("safety_checker", "feature_extractor", "requires_safety_checker", "image_encoder")  # filters, not the model


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Networks, their parameters, and the two JSON files that say how they belong together.

    Attributes:
      nets: "unet", "vae" and "text_encoder" without weights.
      params: the weights of each, host arrays as they were read.
      tokenizer: prompts → token ids.
      scheduler: `scheduler_config.json`.
      index: `model_index.json`.
    """

    nets: dict[str, Net]
    params: dict[str, Params]
    tokenizer: Tokenizer
    scheduler: dict[str, Any]
    index: dict[str, Any]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """[h, w, c] of the latents the UNet was made for."""
        unet = self.nets["unet"].config
        return (unet.sample_size, unet.sample_size, unet.in_channels)


def locate(source: str) -> str:
    """The folder of an embedded model if `source` names one and is no folder itself; else `source`."""
    embedded = EMBEDDED / source
    return str(embedded) if "/" not in source and embedded.is_dir() and not Path(source).is_dir() else source


def load(source: str, *, variant: str | None, dtype=jnp.float32, attention: str) -> Pipeline:
    """Reads a pipeline from a directory, a hub id, or the name of an embedded model ("openmoji").

    Args:
      variant: e.g. "fp16" for weight files of that name; None for the plain ones.
      dtype: compute type of the networks; parameters are float32.
      attention: "xla" or "cudnn".

    Raises:
      FileNotFoundError, ValueError: naming the file and what is wrong with it.
    """
    source = locate(source)
    index = _read(source, "", "model_index.json")
    check_index(index, source)
    loaded = {name: cls.from_pretrained(source, name, variant=variant, dtype=dtype, attention=attention)
              for name, cls in NETWORKS.items()}
    nets, params = ({name: pair[i] for name, pair in loaded.items()} for i in (0, 1))
    _check_widths(nets, source)
    return Pipeline(nets, params, Tokenizer.from_pretrained(source), _read(source, "scheduler",
                                                                           "scheduler_config.json"), index)


def _read(source: str, subfolder: str, name: str) -> dict[str, Any]:
    folder = Path(source).expanduser()
    if not folder.is_dir():
        folder = hub.snapshot(source, [f"{subfolder}/{name}" if subfolder else name])
    return files.read_json(folder / subfolder / name)


def check_index(index: Mapping[str, Any], source: str) -> None:
    """Refuses a pipeline with a part this package does not have.

    Raises:
      ValueError: naming the part, its class and the classes known.
    """
    for name, value in index.items():
        cls = value[1] if isinstance(value, list | tuple) else value
        if name in _CLASSES and cls not in _CLASSES[name]:
            raise ValueError(f"{source}/model_index.json: {name} is {cls!r}; supported: {', '.join(_CLASSES[name])}")
        known = name in _CLASSES or name in _NOT_OURS or name == "scheduler" or name.startswith("_")
        if not known and isinstance(value, list) and cls is not None:
            raise ValueError(f"{source}/model_index.json: part {name!r} ({cls}) is not supported; "
                             f"supported parts: {', '.join((*NETWORKS, 'tokenizer', 'scheduler'))}")
    absent = [name for name in (*NETWORKS, "tokenizer", "scheduler") if name not in index]
    if absent:
        raise ValueError(f"{source}/model_index.json names no {', '.join(absent)}")


def _check_widths(nets: Mapping[str, Net], source: str) -> None:
    unet, text, vae = (nets[name].config for name in ("unet", "text_encoder", "vae"))
    for what, ours, theirs in (("cross_attention_dim", unet.cross_attention_dim, text.hidden_size),
                               ("in_channels", unet.in_channels, vae.latent_channels)):
        if ours != theirs:
            raise ValueError(f"{source}: unet has {what}={ours}, but its partner gives {theirs}; "
                             "the folders are not of one model")


def save(pipeline: Pipeline, directory: str | Path, **options) -> None:
    """Writes what `load`, and PyTorch diffusers' `StableDiffusionPipeline.from_pretrained`, read.

    `model_index.json` comes last, so that a directory that has one is whole. `options` go to `port.save`.
    """
    directory = Path(directory)
    for name, net in pipeline.nets.items():
        net.save_pretrained(pipeline.params[name], directory / name, **options)
    pipeline.tokenizer.save_pretrained(directory / "tokenizer")
    (directory / "scheduler").mkdir(exist_ok=True)
    for path, content in (("scheduler/scheduler_config.json", pipeline.scheduler), ("model_index.json", pipeline.index)):
        with files.whole(directory / path) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n")
