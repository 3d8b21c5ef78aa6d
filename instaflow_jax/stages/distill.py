"""Stage `distill`: a straightened flow → a one-step generator (paper, Eq. 6), by L2, LPIPS, or one after the other."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from instaflow_jax import pipeline
from instaflow_jax.arrays import Params
from instaflow_jax.models.lpips import LPIPS, PUBLISHED
from instaflow_jax.models.net import Net
from instaflow_jax.models.stacked_unet import StackedUNet
from instaflow_jax.stages import reflow
from instaflow_jax.stages.common import fit, flow_training, loading
from instaflow_jax.stages.generate.stage import check_pairs, has_pairs, made_by, need_pairs
from instaflow_jax.train import losses
from instaflow_jax.train.step import Loss
from instaflow_jax.weights.conventions import NUM_TIMESTEPS

DISTANCES = ("l2", "lpips")
LPIPS_FILES = ("model", "trunk", "heads", "net")  # fields of config.lpips that say where its weights are


def run(config: ConfigDict, workdir: str) -> None:
    """Trains in `workdir`/`config.output` on the pairs that the flow `config.model` made.

    First makes what is missing: the flow (if `config.model` is ""), by `reflow` with `config.reflow`, and the pairs, in
    `workdir`/`config.pairs_folder`.

    Raises:
      ValueError, FileNotFoundError: a field of the config, the flow or the pairs are wrong.
      OSError, FloatingPointError: see `train.loop`.
    """
    options = read_options(config, workdir)
    folder = Path(workdir) / config.pairs_folder
    if not has_pairs(folder) or (not config.model and not reflow.is_trained(config.reflow, workdir)):
        check(config, workdir)
    source = config.model or reflow.need(config.reflow, workdir)
    pairs = need_pairs(made_by(config.pairs, source), folder)
    start, directory = config.init_from or source, Path(workdir) / config.output
    pipe = stack(config.stacked.to_dict(), loading.load(start, options.weights), options.weights)
    flow_training.train_flow(options, directory, pipe, pairs, *load_loss(config, options, pipe), source=start)


def check(config: ConfigDict, workdir: str) -> None:
    """Every check of `run` and of the stages that it would run first, without training or writing anything.

    Raises:
      ValueError, FileNotFoundError: see `run`.
    """
    options, flow = read_options(config, workdir), None
    source = config.model or reflow.export_directory(config.reflow, workdir)
    if not config.model and not reflow.is_trained(config.reflow, workdir):
        flow = reflow.check(config.reflow, workdir)
    recipe = check_pairs(made_by(config.pairs, source), Path(workdir) / config.pairs_folder, flow)
    pipe = flow if flow and not config.init_from else loading.load(config.init_from or source, options.weights)
    pipe = stack(config.stacked.to_dict(), pipe, options.weights)
    flow_training.check(options, pipe, recipe, *load_loss(config, options, pipe))


def read_options(config: ConfigDict, workdir: str) -> flow_training.FlowOptions:
    """Checks and unpacks the config before anything is loaded. Raises ValueError."""
    if config.distance not in DISTANCES:
        raise ValueError(f"config.distance={config.distance!r} is not one of {', '.join(DISTANCES)}")
    if config.lpips.net not in PUBLISHED:
        raise ValueError(f"config.lpips.net={config.lpips.net!r} is not one of {', '.join(PUBLISHED)}")
    if config.consistency and (config.match or config.distance != "l2"):
        raise ValueError(
            f"config.consistency={tuple(config.consistency)} has a loss of its own: use config.match=0 and "
            f"config.distance=l2, not {config.match:g} and {config.distance}, or config.consistency='()'"
        )
    options = flow_training.read_flow_options(config)
    fit.check_same_run(options.train, Path(workdir) / config.output, chosen=("pairs.model",))
    return options


def stack(fields: Mapping[str, Any], pipe: pipeline.Pipeline, weights: loading.WeightOptions) -> pipeline.Pipeline:
    """The pipeline with a Stacked U-Net, if `fields` (the block `config.stacked`) ask for one and it has none yet.

    Raises:
      ValueError, FileNotFoundError: the model for half 2 is wrong or of another kind, or a field has no effect.
    """
    unet = pipe.nets["unet"]
    if not fields["enabled"]:
        return pipe
    if unet.module is StackedUNet:
        if fields["second"] or fields["middle_norm"] != unet.config.middle_norm:
            raise ValueError(
                "the model to start from is a Stacked U-Net already: use config.stacked.second='' and "
                f"config.stacked.middle_norm={unet.config.middle_norm}, or another config.init_from"
            )
        return pipe
    second = pipe
    if fields["second"]:
        second = loading.load(fields["second"], dataclasses.replace(weights, delta=None, loras=()))
        if type(flow_training.start_dynamics(second)) is not type(flow_training.start_dynamics(pipe)):
            raise ValueError(
                f"config.stacked.second={fields['second']!r} and the model to start from must both be flows, or both "
                "teachers"
            )
    return pipeline.stack(pipe, second, middle_norm=fields["middle_norm"], **loading.network_options(weights))


def load_loss(
    config: ConfigDict, options: flow_training.FlowOptions, pipe: pipeline.Pipeline
) -> tuple[Loss, dict[str, Params]]:
    """The loss, and the weights it reads besides those of every flow's training. Raises as `run` does."""
    if config.distance == "l2":
        return make_loss(config, options, pipe.nets), {}
    lpips, params = load_lpips(options.weights.dtype, **{name: config.lpips[name] for name in LPIPS_FILES})
    loss = make_loss(config, options, pipe.nets | {"lpips": lpips})
    return loss, {"vae": pipe.params["vae"], "lpips": params}


def make_loss(config: ConfigDict, options: flow_training.FlowOptions, nets: Mapping[str, Net]) -> Loss:
    """The loss of `config.consistency` or `config.distance`; `nets` holds "lpips" too where that needs it.

    Raises:
      ValueError: a field is wrong.
    """
    unet, text_encoder = nets["unet"].with_remat(options.remat["unet"]), nets["text_encoder"]
    shared = {"prompt_dropout": options.prompt_dropout, "num_timesteps": NUM_TIMESTEPS, "penalty": config.penalty}
    if config.consistency:
        return losses.make_consistency_loss(unet, text_encoder, steps=tuple(config.consistency), **shared)
    distance = losses.make_latent_distance(config.penalty)
    if config.distance == "lpips":
        fields = {name: config.lpips[name] for name in config.lpips if name not in LPIPS_FILES}
        vae, lpips = (nets[name].with_remat(options.remat[name]) for name in ("vae", "lpips"))
        distance = losses.make_lpips_distance(vae, lpips, **fields)
    return losses.make_distill_loss(unet, text_encoder, distance, match=config.match, **shared)


def load_lpips(dtype: str, *, model: str, trunk: str, heads: str, net: str) -> tuple[Net, Params]:
    """The perceptual network and its weights.

    Args:
      dtype: compute type of the trunk; its features are compared in float32.
      model: embedded name or directory with lpips/, used if `trunk` is "".
      trunk, heads, net: torchvision's and the lpips package's weight files, and the network they belong to.
    """
    if trunk:
        lpips, params = LPIPS.from_files(trunk, heads, net=net, dtype=loading.DTYPES[dtype])
    else:
        loading.check_files(model)
        lpips, params = LPIPS.from_pretrained(pipeline.locate(model), "lpips", dtype=loading.DTYPES[dtype])
    loading.check_finite(trunk or f"{model}/lpips", params)
    return lpips, params
