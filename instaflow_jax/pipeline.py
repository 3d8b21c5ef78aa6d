"""A complete Stable Diffusion on disk: reads and writes the folders that `model_index.json` names.

Single-file checkpoints can be read too. A delta of another model and LoRA files can be added to the weights.
"""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from instaflow_jax import teacher
from instaflow_jax.arrays import Params
from instaflow_jax.infra import files, stores
from instaflow_jax.models.clip import CLIPTextModel
from instaflow_jax.models.net import Model, Net
from instaflow_jax.models.stacked_unet import StackedUNet, stack_net, stack_params
from instaflow_jax.models.unet import UNet2DConditionModel
from instaflow_jax.models.vae import AutoencoderKL
from instaflow_jax.weights import hub, ldm, lora
from instaflow_jax.weights.conventions import single_file_scheduler
from instaflow_jax.weights.delta import Delta, add_delta
from instaflow_jax.weights.tokenizer import Tokenizer

EMBEDDED = Path(__file__).parent / "assets"  # folder of the embedded models
NETWORKS = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
SINGLE_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
_CLASSES = {name: (cls.__name__, "Flax" + cls.__name__) for name, cls in NETWORKS.items()}
_CLASSES["unet"] += (StackedUNet.__name__,)
_CLASSES["tokenizer"] = ("CLIPTokenizer", "CLIPTokenizerFast")
_CLASSES["_class_name"] = ("StableDiffusionPipeline", "FlaxStableDiffusionPipeline", "RectifiedFlowPipeline")
_CLASSES["_class_name"] += ("InstaFlowPipeline",)
_NOT_READ = ("safety_checker", "feature_extractor", "requires_safety_checker", "image_encoder")  # output filters


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
        """See `latent_shape`."""
        return latent_shape(self.nets)

    def image_size(self, shape: tuple[int, int, int]) -> tuple[int, int]:
        """Height and width in pixels of the images of latents of `shape` [h, w, c]."""
        h, w, _ = shape
        factor = self.nets["vae"].config.factor
        return h * factor, w * factor


def inference_params(nets: Mapping[str, Net], params: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The weights that text-to-image reads, in the types it computes with; arrays or shapes.

    Kernels and embeddings are cast once (`Net.cast`). In place of the autoencoder's encoder stand empty arrays, so that
    it is not uploaded.
    """

    def only_read(name: str, key: str, value: Any) -> Any:
        unread = name == "vae" and key.startswith(("encoder.", "quant_conv."))
        return np.zeros(0, value.dtype) if unread else value

    cast = {name: nets[name].cast(weights) for name, weights in params.items()}
    return {name: {key: only_read(name, key, value) for key, value in w.items()} for name, w in cast.items()}


def network_class(name: str, stated: str | None) -> type[Model]:
    """The class of the network called `name` in a file that states the class name `stated`."""
    return StackedUNet if name == "unet" and stated == StackedUNet.__name__ else NETWORKS[name]


def stack(pipe: Pipeline, second: Pipeline, *, middle_norm: bool, **options) -> Pipeline:
    """The pipeline with a Stacked U-Net whose halves start as the UNets of `pipe` and `second`.

    Args:
      middle_norm: see `StackedUNetConfig`.
      options: `Model.from_config`'s.

    Raises:
      ValueError: the two UNets have different architectures.
    """
    fields, others = (dataclasses.asdict(pipe.nets["unet"].config) for pipe in (pipe, second))
    differ = [f"{name}={value}, not {others.get(name)}" for name, value in fields.items() if others.get(name) != value]
    if differ or pipe.nets["unet"].module is not second.nets["unet"].module:
        raise ValueError(f"the halves of a Stacked U-Net need two U-Nets of one architecture: {'; '.join(differ)}")
    unet = stack_net(pipe.nets["unet"], middle_norm, **options)
    params = stack_params(unet, pipe.params["unet"], second.params["unet"])
    return dataclasses.replace(
        pipe,
        nets=pipe.nets | {"unet": unet},
        params=pipe.params | {"unet": params},
        index=pipe.index | {"unet": [StackedUNet.torch_code.stem, StackedUNet.__name__]},
    )


def latent_shape(nets: Mapping[str, Net]) -> tuple[int, int, int]:
    """[h, w, c] of the latents the UNet was trained on.

    Raises:
      ValueError: the UNet's config does not say.
    """
    unet = nets["unet"].config
    if unet.sample_size is None:
        raise ValueError(
            "the UNet's config.json has no sample_size; set config.height and config.width, or write into "
            "config.json the side of its latents (64 for Stable Diffusion 1.x)"
        )
    size = unet.sample_size if isinstance(unet.sample_size, tuple) else (unet.sample_size,) * 2
    return (*size, unet.in_channels)


def locate(source: str) -> str:
    """The folder of the embedded model that `source` names, unless `source` is a folder itself; else `source`.

    What is in a bucket is downloaded first, and the folder is the local copy.
    """
    if stores.is_stored(source):
        return str(stores.local(source))
    embedded = EMBEDDED / source
    return str(embedded) if "/" not in source and embedded.is_dir() and not Path(source).is_dir() else source


def load(
    source: str,
    *,
    variant: str | None,
    dtype=jnp.float32,
    attention: str,
    kernels: str = "auto",
    base: str = "",
    delta: Delta | None = None,
    loras: Sequence[tuple[str, float]] = (),
) -> Pipeline:
    """Reads a pipeline from a directory, a hub id, the name of an embedded model ("openmoji"), or a single file.

    Args:
      variant: e.g. "fp16" for weight files of that name, where a folder has them; None for files without a variant.
        In a single file, "ema" means the UNet's EMA weights.
      dtype: compute type of the networks; parameters are float32.
      attention: "auto" or "xla", see `kernels.attention`.
      kernels: "auto" for the hand-written kernels where they are faster, "xla" for XLA's own everywhere.
      base: for a single file, a directory or hub id of the same family, which provides configs, tokenizer, scheduler.
      delta: change of another model, added to the UNet; see `Delta`.
      loras: LoRA files and their scales, merged in this order after the delta.

    Raises:
      FileNotFoundError, ValueError: naming the file and what is wrong with it.
    """
    options = {"variant": variant, "dtype": dtype, "attention": attention, "kernels": kernels, "base": base}
    home = _home(source, base)
    index = _read(home, "model_index.json")
    check_index(index, home)
    scheduler, index = _with_stated_prediction(source, _read(home, "scheduler/scheduler_config.json"), index)
    nets, params = networks(source, {name: network_class(name, index[name][1]) for name in NETWORKS}, **options)
    tokenizer = Tokenizer.from_pretrained(home)
    _check_widths(nets, tokenizer, source)
    pipe = Pipeline(nets, params, tokenizer, scheduler, index)
    if delta:
        pipe = _with_delta(pipe, delta, options)
    for path, scale in loras:
        pipe = dataclasses.replace(pipe, params=lora.merge(pipe.params, path, scale))
    return pipe


def networks(
    source: str,
    classes: Mapping[str, type[Model]],
    *,
    variant: str | None,
    dtype=jnp.float32,
    attention: str = "xla",
    kernels: str = "auto",
    base: str = "",
) -> tuple[dict[str, Net], dict[str, Params]]:
    """The networks called "unet", "vae" or "text_encoder", each of its class, and their weights; see `load`."""
    options = {"dtype": dtype, "attention": attention, "kernels": kernels}
    if not _is_file(source):
        loaded = _from_folders(locate(source), classes, variant, options)
        return tuple({name: pair[i] for name, pair in loaded.items()} for i in (0, 1))
    home, nets = _home(source, base), {}
    for name, cls in NETWORKS.items():
        raw = hub.read_config(_folder(home, f"{name}/config.json") / name, cls.__name__)
        nets[name] = cls.from_config(raw, **options)
    configs, shapes = ({name: getattr(net, field) for name, net in nets.items()} for field in ("config", "shapes"))
    params = ldm.read(stores.local(source), configs, shapes, variant)
    for name in [name for name in classes if name not in params]:
        warnings.warn(f"{source} has no {name}; that of base={base} is used", stacklevel=2)
        params[name] = _from_folders(home, {name: NETWORKS[name]}, None, options)[name][1]
    return {name: nets[name] for name in classes}, {name: params[name] for name in classes}


def _from_folders(
    source: str, classes: Mapping[str, type[Model]], variant: str | None, options: Mapping[str, Any]
) -> dict[str, tuple[Net, Params]]:
    """The networks in folders of these names; where only some have the variant, the others' usual files are read."""
    loaded, failed = {}, {}
    for name, cls in classes.items():
        try:
            loaded[name] = cls.from_pretrained(source, name, variant=variant, **options)
        except FileNotFoundError as error:
            failed[name] = error
    for name, error in failed.items():
        if not variant or not loaded:
            raise error
        loaded[name] = classes[name].from_pretrained(source, name, variant=None, **options)
        warnings.warn(f"{source}/{name} has no weights of variant {variant!r}; its usual ones are used", stacklevel=2)
    return loaded


def _with_stated_prediction(
    source: str, scheduler: dict[str, Any], index: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The scheduler and index of `base` with what a single file itself says of its prediction; see `ldm`.

    A file that says that it is a flow needs no scheduler of `base`.

    Raises:
      ValueError: the file says that it is a teacher, but `base` is a flow.
    """
    stated = ldm.prediction_fields(stores.local(source)) if _is_file(source) else {}
    if stated.get("prediction_type") == "flow_prediction":
        return single_file_scheduler(index)
    news = {k: v for k, v in stated.items() if (scheduler.get(k) or teacher.DEFAULTS[k]) != v}
    is_flow = scheduler.get("prediction_type") == "flow_prediction"
    is_flow |= scheduler.get("_class_name") == "FlowMatchEulerDiscreteScheduler"
    is_flow |= index.get("_class_name") in ("RectifiedFlowPipeline", "InstaFlowPipeline")
    # Programs that know no flows call every flow "epsilon".
    if not news or (is_flow and news == {"prediction_type": "epsilon"}):
        return scheduler, index
    said = ", ".join(f"{name}={value}" for name, value in news.items())
    if is_flow:
        raise ValueError(f"{source} asks for {said}, but its base is a flow; use the base of a teacher")
    if "rescale_betas_zero_snr" in news:  # a start before the last timestep would leave zero SNR unused
        news["timestep_spacing"] = "trailing"
    warnings.warn(f"{source} asks for {said}; this replaces what the scheduler of base says", stacklevel=3)
    # DDIM's class knows all of these fields; diffusers would ignore some in PNDM's.
    fields = {"_class_name": "DDIMScheduler", "clip_sample": False}
    kept = {name: value for name, value in scheduler.items() if name != "skip_prk_steps"}
    return kept | fields | news, index | {"scheduler": ["diffusers", "DDIMScheduler"]}


def _with_delta(pipe: Pipeline, delta: Delta, options: Mapping[str, Any]) -> Pipeline:
    custom, origin = (_prediction_type(source, options["base"]) for source in (delta.custom, delta.origin))
    if custom and origin and custom != origin:
        raise ValueError(
            f"delta: custom={delta.custom!r} has prediction_type={custom}, but origin={delta.origin!r} has {origin}; "
            "use two models that predict the same"
        )
    nets, params = networks(delta.custom, NETWORKS, **options)
    _, origin = networks(delta.origin, {"unet": NETWORKS["unet"]}, **options)
    names = {"custom": delta.custom, "origin": delta.origin}
    unet = add_delta(pipe.params["unet"], params["unet"], origin["unet"], delta.scale, names=names)
    tokenizer = Tokenizer.from_pretrained(_home(delta.custom, options["base"]))
    nets, params = nets | {"unet": pipe.nets["unet"]}, params | {"unet": unet}
    _check_widths(nets, tokenizer, delta.custom)
    return dataclasses.replace(pipe, nets=nets, params=params, tokenizer=tokenizer)


def _prediction_type(source: str, base: str) -> str:
    """What the network of a teacher on this machine predicts; "" if that is not known."""
    stated = ldm.prediction_fields(stores.local(source)) if _is_file(source) else {}
    path = stores.local(_home(source, base)) / "scheduler" / "scheduler_config.json"
    scheduler = files.read_json(path) if path.is_file() else {"prediction_type": ""}
    kind = ({"prediction_type": "epsilon"} | scheduler | stated)["prediction_type"]
    return "" if kind == "flow_prediction" else kind


def _is_file(source: str) -> bool:
    return Path(source).suffix in SINGLE_FILES or Path(source).expanduser().is_file()


def _home(source: str, base: str) -> str:
    """Where the configs, tokenizer and scheduler are: in `source`, or in `base` if `source` is a single file."""
    if not _is_file(source):
        return locate(source)
    if not stores.local(source).is_file():
        raise FileNotFoundError(f"there is no file {source}")
    try:
        _folder(locate(base), "model_index.json")
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{source} is a single file, which has no configs and no tokenizer; use base=DIR with a directory "
            f"or hub id of the same family in diffusers layout. {error}"
        ) from error
    return locate(base)


def _folder(source: str, name: str) -> Path:
    """The local folder of a directory or hub id; from the hub only the file `name` is downloaded."""
    folder = stores.local(source)
    return folder if source and folder.is_dir() else hub.snapshot(source, [name])


def _read(source: str, name: str) -> dict[str, Any]:
    return files.read_json(_folder(source, name) / name)


def check_index(index: Mapping[str, Any], source: str) -> None:
    """Refuses a pipeline with a part that this package does not support.

    Raises:
      ValueError: naming the part, its class and the supported classes.
    """
    for name, value in index.items():
        if isinstance(value, list) and len(value) != 2:
            raise ValueError(f"{source}/model_index.json: {name} is {value!r}; use [library, class]")
        cls = value[1] if isinstance(value, list | tuple) else value
        if name in _CLASSES and cls not in _CLASSES[name]:
            raise ValueError(f"{source}/model_index.json: {name} is {cls!r}; supported: {', '.join(_CLASSES[name])}")
        known = name in _CLASSES or name in _NOT_READ or name == "scheduler" or name.startswith("_")
        if not known and isinstance(value, list) and cls is not None:
            raise ValueError(
                f"{source}/model_index.json: part {name!r} ({cls}) is not supported; "
                f"supported parts: {', '.join((*NETWORKS, 'tokenizer', 'scheduler'))}"
            )
    missing = [name for name in (*NETWORKS, "tokenizer", "scheduler") if name not in index]
    if missing:
        raise ValueError(f"{source}/model_index.json does not list {', '.join(missing)}; use a complete pipeline")


def _check_widths(nets: Mapping[str, Net], tokenizer: Tokenizer, source: str) -> None:
    unet, text, vae = (nets[name].config for name in ("unet", "text_encoder", "vae"))
    for field, value, other, needed in (
        ("cross_attention_dim", unet.cross_attention_dim, "text_encoder has hidden_size", text.hidden_size),
        ("in_channels", unet.in_channels, "vae has latent_channels", vae.latent_channels),
    ):
        if value != needed:
            raise ValueError(f"{source}: unet has {field}={value}, but {other}={needed}; use folders of the same model")
    if tokenizer.size > text.vocab_size:  # JAX would read beyond the table without an error
        raise ValueError(
            f"{source}: the tokenizer has ids up to {tokenizer.size - 1}, but text_encoder has vocab_size="
            f"{text.vocab_size}; use the text encoder that was trained with the tokenizer's added tokens"
        )


def save(pipeline: Pipeline, directory: str | Path, **options) -> None:
    """Writes what `load` and PyTorch diffusers' `StableDiffusionPipeline.from_pretrained` read.

    `model_index.json` is written last, so a directory that has one is complete. `options` go to `port.save`.
    """
    directory = Path(directory)
    for name, net in pipeline.nets.items():
        net.save_pretrained(pipeline.params[name], directory / name, **options)
    pipeline.tokenizer.save_pretrained(directory / "tokenizer")
    (directory / "scheduler").mkdir(exist_ok=True)
    files.write_json(directory / "scheduler" / "scheduler_config.json", pipeline.scheduler, indent=2)
    files.write_json(directory / "model_index.json", _without_filters(pipeline.index), indent=2)


def _without_filters(index: Mapping[str, Any]) -> dict[str, Any]:
    """The index without the parts that were not read, so that diffusers does not look for their folders."""
    gone = {name: [None, None] if isinstance(index[name], list) else False for name in _NOT_READ if name in index}
    return dict(index) | gone
