"""The model to export: the weights of a training run or a model in diffusers layout, and its recorded origin."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from instaflow_jax import pipeline, sampling, teacher
from instaflow_jax.arrays import Params
from instaflow_jax.infra import checkpoint, devices, files, stores
from instaflow_jax.infra.stores import CHECKPOINTS
from instaflow_jax.stages import distill
from instaflow_jax.stages.common import adapters, flow_training, loading
from instaflow_jax.stages.common.loading import WeightOptions
from instaflow_jax.train.lora import merge, to_layers
from instaflow_jax.weights.conventions import NUM_TIMESTEPS, scaled
from instaflow_jax.weights.delta import Delta
from instaflow_jax.weights.lora import Layer, Target

MANIFEST = "export.json"  # marks a directory that this stage wrote, and records the run's config
WEIGHTS = ("ema", "params")


@dataclasses.dataclass(frozen=True)
class Adapters:
    """The adapters that a run trained, which are part of its UNet's weights too.

    Attributes:
      layers: as LoRA files hold them.
      base: the model that they belong to.
      is_converted: whether the run changed that model before it trained them (a warm start, a Stacked U-Net).
    """

    layers: dict[Target, Layer]
    base: str
    is_converted: bool


@dataclasses.dataclass(frozen=True)
class Source:
    """A model to export.

    Attributes:
      name: the directory, hub id or embedded name that it was loaded from.
      pipe: networks and host arrays. The UNet of a flow predicts X1 − X0, whatever its directory's convention.
      dynamics: `sampling.Flow(1, num_timesteps)`, or a teacher's schedule.
      run: the resolved config it was trained with; {} if unknown.
      step: the training step of its checkpoint; None if it was not read from a checkpoint.
      weights: "ema" or "params", which weights were read from the checkpoint.
      adapters: None if the run trained all weights.
    """

    name: str
    pipe: pipeline.Pipeline
    dynamics: sampling.Dynamics
    run: dict[str, Any]
    step: int | None
    weights: str = "ema"
    adapters: Adapters | None = None


def load(name: str, weights: str, dynamics: str, options: WeightOptions) -> Source:
    """Reads a run directory, or a model that `pipeline.load` reads.

    Args:
      weights: "ema" or "params" of a run.
      dynamics: "auto", "flow" or "teacher" of a model that is not a run.

    Raises:
      FileNotFoundError, ValueError: the model or run does not exist, or its files are wrong.
    """
    run = _path(name)
    if checkpoint.has_checkpoints(run / CHECKPOINTS):
        return load_run(run, weights, options)
    pipe = loading.load(name, options)
    found = sampling.read_dynamics(pipe.scheduler, pipe.index, dynamics)
    if isinstance(found, sampling.Flow):  # the UNet's last convolution absorbs the factor
        pipe = replace_unet(pipe, scaled(pipe.params["unet"], found.factor))
        found = sampling.Flow(1, found.num_timesteps)
    return Source(stores.address(name), pipe, found, run_config(name), None, weights)


def load_run(run: Path, weights: str, options: WeightOptions) -> Source:
    """The newest checkpoint of a run that trained a flow, in the pipeline it was trained in."""
    saved, step = read_run(run), checkpoint.complete_steps(run / CHECKPOINTS)[-1]
    if saved.get("stage") not in ("reflow", "distill", "refine", "progressive"):
        raise ValueError(
            f"{run} is a run of stage {saved.get('stage')!r}, not of reflow, distill, refine or progressive; "
            "pretraining writes WORKDIR/export in diffusers layout itself: use that as config.model"
        )
    if options.loras or options.delta:
        raise ValueError(
            f"config.loras and config.delta change a model in diffusers layout, but {run} is a run: export it "
            "first with config.convention='released', then merge into that export"
        )
    pipe = load_base_pipeline(run, saved, options)
    mesh, fields = devices.make_mesh(fsdp=1), {"step": step, "verify": options.verify}
    read = functools.partial(checkpoint.load_weights, run / CHECKPOINTS, weights, mesh, **fields)
    if adapters.find_base(run, saved):
        unet, found = load_adapters(run, saved, pipe, read)
    else:
        unet, found = jax.device_get(read(like=pipe.nets["unet"].shapes)), None
    loading.check_finite(f"{run / CHECKPOINTS / str(step) / weights}", unet)
    pipe, dynamics = replace_unet(pipe, unet), sampling.Flow(1, NUM_TIMESTEPS)
    if keeps_head(saved):
        pipe = flow_training.as_straight_teacher(pipe, unet)
        dynamics = teacher.read_schedule(pipe.scheduler)
    return Source(stores.address(run), pipe, dynamics, saved, step, weights, found)


def keeps_head(run: dict[str, Any]) -> bool:
    """Whether a run with this config trained a teacher's own head (rectified diffusion) and not a flow."""
    return run.get("path") == "sd"


def load_base_pipeline(run: Path, saved: dict[str, Any], options: WeightOptions) -> pipeline.Pipeline:
    """The pipeline around a run's UNet: the run's own export if it finished, else the model it started from.

    For a run of adapters always the model it started from, with that model's weights.
    """
    base = adapters.find_base(run, saved)
    if not base and (run / loading.EXPORT / "model_index.json").is_file():
        return loading.load(str(run / loading.EXPORT), dataclasses.replace(options, weights_variant=""))
    as_trained = dataclasses.replace(
        options,
        base=saved["base"],
        delta=Delta(**saved["delta"]) if saved["delta"]["custom"] else None,
        loras=loading.read_scales("loras", saved["loras"]),
        weights_variant=saved["weights_variant"],
    )
    pipe = loading.load(base or parents(saved)[0], as_trained)
    return distill.stack(saved["stacked"], pipe, as_trained) if "stacked" in saved else pipe


def load_adapters(
    run: Path, saved: dict[str, Any], pipe: pipeline.Pipeline, read: Callable[..., Params]
) -> tuple[Params, Adapters]:
    """The UNet's weights with a run's adapters added, and the adapters.

    Args:
      pipe: of `load_base_pipeline`.
      read: `read(like=shapes)` reads the weights of the run's checkpoint.

    Raises:
      ValueError: the model that the adapters belong to has changed.
    """
    adapters.check_base(run, saved, pipe.params["unet"])
    warm_start = saved["warm_start"] and not keeps_head(saved)
    start, lora = flow_training.initial_params(pipe, warm_start), adapters.read_saved_lora(saved)
    params = jax.device_get(read(like=adapters.shapes(lora, pipe.nets["unet"])))
    is_converted = start is not pipe.params["unet"] or saved.get("stacked", {}).get("enabled", False)
    found = Adapters(to_layers(params, lora.alpha), saved["lora"]["base"]["model"], is_converted)
    return merge(start, params, lora.alpha), found


def replace_unet(pipe: pipeline.Pipeline, unet: dict[str, Any]) -> pipeline.Pipeline:
    return dataclasses.replace(pipe, params=pipe.params | {"unet": unet})


def parents(run: dict[str, Any]) -> list[str]:
    """The models a run was made from; first the one whose weights it started from ("start" in version 0.1)."""
    names = [run[field] for field in ("init_from", "start", "model") if run.get(field)]
    names += [run["pairs"]["model"]] if "pairs" in run else []
    names += [run["stacked"]["second"]] if run.get("stacked", {}).get("second") else []
    return names + ([run["reflow"]["model"]] if "reflow" in run and not run["model"] else [])


def run_config(name: str) -> dict[str, Any]:
    """The resolved config of a run directory, or of the run behind an export; {} if there is none."""
    for run in (_path(name), _path(name).parent):
        if checkpoint.complete_steps(run / CHECKPOINTS):
            return read_run(run)
    manifest = _path(name).parent / MANIFEST
    if not manifest.is_file():
        return {}
    damage = files.find_damage(manifest.parent, parts=(MANIFEST,))
    if damage:
        raise ValueError(f"{damage}; make the export again")
    return files.read_json(manifest)["run"]


def read_run(run: Path) -> dict[str, Any]:
    """The config that the newest checkpoint of a run holds.

    A distillation with `model` "" took the flow of its own workdir: `pairs.model` then names that flow, and `reflow`
    holds the config that the flow was trained with, if the flow is still there.
    """
    saved = checkpoint.load_config(run / CHECKPOINTS, step=None)
    if saved.get("stage") != "distill" or saved["model"]:
        return saved
    flow = run.parent / saved["reflow"].get("output", "reflow")
    if not loading.has_export(flow):
        return saved
    source = stores.address(flow / loading.EXPORT)
    return saved | {"pairs": saved["pairs"] | {"model": source}, "reflow": run_config(source) or {"model": ""}}


def flow_steps(source: Source) -> int:
    """The number of steps to draw in: that of the round for progressive distillation, else one."""
    return source.run["N"] if source.run.get("stage") == "progressive" else 1


def _path(name: str) -> Path:
    """The folder of this machine that `name` stands for."""
    return stores.local(name) if stores.is_stored(name) else Path(name)
