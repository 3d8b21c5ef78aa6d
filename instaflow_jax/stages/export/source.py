"""What is exported: the weights of a run, or a model in diffusers layout, and what is known of where it comes from."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from instaflow_jax import pipeline, sampling
from instaflow_jax.arrays import Params
from instaflow_jax.infra import checkpoint, devices, files
from instaflow_jax.stages import distill
from instaflow_jax.stages.common import flow_training as straighten
from instaflow_jax.stages.common import loading

CHECKPOINTS = "checkpoints"
MANIFEST = "export.json"  # marks a directory as one that this stage wrote, and keeps the run's config
WEIGHTS = ("ema", "params")


@dataclasses.dataclass(frozen=True)
class Source:
    """A model to export.

    Attributes:
      name: what it was asked for by.
      pipe: networks and host arrays; the UNet of a flow predicts X1 − X0, whatever its directory's convention.
      dynamics: `sampling.Flow(1, steps)`, or a teacher's schedule.
      run: the resolved config it was trained with; {} where nothing tells.
      step: of the checkpoint; None where there is none.
    """

    name: str
    pipe: pipeline.Pipeline
    dynamics: sampling.Dynamics
    run: dict[str, Any]
    step: int | None


def load(config: ConfigDict, workdir: str) -> Source:
    """Reads `config.model`; "" is the run that stage `distill` left in `workdir`, trained first if it is not there.

    Raises:
      FileNotFoundError, ValueError: there is no such model or run, or its files are wrong.
    """
    name = config.model or need_distill(config, workdir)
    if (Path(name) / CHECKPOINTS).is_dir():
        return load_run(config, Path(name))
    pipe = loading.load(name, loading.read_weight_options(config))
    dynamics = sampling.read_dynamics(pipe.scheduler, pipe.index, config.dynamics)
    return canonical(Source(name, pipe, dynamics, run_config(name), None))


def need_distill(config: ConfigDict, workdir: str) -> str:
    """The run in `workdir` that `config.distill` makes; it is made first if it is not there."""
    run = Path(workdir) / config.distill.output
    if not (run / CHECKPOINTS).is_dir() and not (run / straighten.EXPORT / "model_index.json").is_file():
        print(f"{run} is not there\n→ distill first", flush=True)
        distill.run(config.distill, workdir)
    return str(run if (run / CHECKPOINTS).is_dir() else run / straighten.EXPORT)


def load_run(config: ConfigDict, run: Path) -> Source:
    """The newest checkpoint of a reflow or distillation, in the pipeline it was trained in."""
    saved, step = checkpoint.load_config(run / CHECKPOINTS, step=None), checkpoint.whole_steps(run / CHECKPOINTS)[-1]
    if saved.get("stage") not in ("reflow", "distill"):
        raise ValueError(
            f"{run} is a run of stage {saved.get('stage')!r}, not of reflow or distill; pretraining writes "
            "WORKDIR/export in diffusers layout itself: name that"
        )
    if config.loras or config.delta.custom:
        raise ValueError(
            f"config.loras and config.delta change a model in diffusers layout, and {run} is a run: export it "
            "first, with config.convention='released', then merge into that"
        )
    pipe = surroundings(config, run, saved)
    loaded = checkpoint.load_weights(
        run / CHECKPOINTS, config.weights, devices.make_mesh(fsdp=1), step=step, like=pipe.nets["unet"].shapes
    )
    pipe = dataclasses.replace(pipe, params=pipe.params | {"unet": jax.device_get(loaded)})
    return Source(str(run), pipe, sampling.Flow(1, straighten.NUM_TIMESTEPS), saved, step)


def surroundings(config: ConfigDict, run: Path, saved: dict[str, Any]) -> pipeline.Pipeline:
    """The pipeline around a run's UNet: what it exported when it ended, else what it began from, loaded as it did."""
    how = {"dtype": config.dtype, "attention": config.attention}
    if (run / straighten.EXPORT / "model_index.json").is_file():
        return loading.load(ConfigDict(config.to_dict() | how | {"weights_variant": ""}), str(run / straighten.EXPORT))
    return loading.load(ConfigDict(saved | how), parents(saved)[0])


def parents(run: dict[str, Any]) -> list[str]:
    """The models a run was made from, the one whose weights it began with first."""
    names = [run[field] for field in ("start", "model") if run.get(field)]
    names += [run["pairs"]["model"]] if "pairs" in run else []
    return names + ([run["reflow"]["model"]] if "reflow" in run and not run["model"] else [])


def run_config(name: str) -> dict[str, Any]:
    """The resolved config of a run directory, or of the run behind an export; {} where there is none."""
    for run in (Path(name), Path(name).parent):
        if checkpoint.whole_steps(run / CHECKPOINTS):
            return checkpoint.load_config(run / CHECKPOINTS, step=None)
    manifest = Path(name).parent / MANIFEST
    return files.read_json(manifest)["run"] if manifest.is_file() else {}


def canonical(source: Source) -> Source:
    """The same flow with factor 1: its UNet's last convolution takes the factor in."""
    if not isinstance(source.dynamics, sampling.Flow):
        return source
    params = source.pipe.params | {"unet": scaled(source.pipe.params["unet"], source.dynamics.factor)}
    return dataclasses.replace(
        source,
        pipe=dataclasses.replace(source.pipe, params=params),
        dynamics=sampling.Flow(1, source.dynamics.num_timesteps),
    )


def scaled(unet: Params, factor: float) -> Params:
    """A UNet whose output is `factor` times as large, and which is otherwise the same."""
    return unet | {
        name: (unet[name] * factor).astype(unet[name].dtype) for name in ("conv_out.kernel", "conv_out.bias")
    }
