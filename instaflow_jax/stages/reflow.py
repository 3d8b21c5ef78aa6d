"""Stage `reflow`: pairs → a flow with straight paths (paper, Eq. 5), and again from that flow's own pairs."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from instaflow_jax import pipeline, sampling, teacher
from instaflow_jax.data.real_images.batches import Share
from instaflow_jax.models.net import Net
from instaflow_jax.stages.common import fit, flow_training, loading, real_images
from instaflow_jax.stages.common.ranges import check_ranges
from instaflow_jax.stages.generate.stage import check_pairs, has_pairs, need_pairs
from instaflow_jax.train import losses
from instaflow_jax.train.step import Loss
from instaflow_jax.weights.conventions import NUM_TIMESTEPS

PATHS = ("flow", "sd")  # what `config.path` may be


class Reflow(NamedTuple):
    """One reflow.

    Attributes:
      config: of this reflow alone, without `k` and `later`.
      directory: where it trains.
      source: the directory that holds its pairs/.
      chosen: fields of `config` that this stage has set.
    """

    config: ConfigDict
    directory: Path
    source: Path
    chosen: tuple[str, ...]


def run(config: ConfigDict, workdir: str) -> None:
    """Trains the flows up to the `config.k`-rectified one, each on the pairs of the model before it.

    With `config.images`, real images take a share of each batch; if they take all of it, no pairs are needed.

    The 2-rectified flow is trained in `workdir`/reflow (`config.output`) on `workdir`/pairs, the 3-rectified flow in
    `workdir`/reflow_3 on `workdir`/reflow/pairs, and so on. Missing pairs are generated first. An earlier flow that has
    been exported is used as it is.

    Raises:
      ValueError, FileNotFoundError: a field of the config, the teacher or the pairs are wrong.
      OSError, FloatingPointError: see `train.loop`.
    """
    left = unfinished(config, Path(workdir))
    for reflow in left:
        read_options(reflow)
    if not all(has_data(reflow, Path(workdir)) for reflow in left):
        check(config, workdir)
    for reflow in left:
        options = read_options(reflow)
        pairs = need_pairs(reflow.config.pairs, reflow.source) if needs_pairs(reflow.config) else None
        pipe = loading.load(reflow.config.model, options.weights)
        share = need_share(reflow.config, Path(workdir), options, pipe, pairs and pairs.manifest["recipe"])
        dynamics = trained_dynamics(reflow.config, pipe)
        loss, source = make_loss(reflow.config, options, pipe.nets, pipe.scheduler), reflow.config.model
        flow_training.train_flow(options, reflow.directory, pipe, pairs, loss, {}, dynamics, source=source, share=share)


def check(config: ConfigDict, workdir: str) -> pipeline.Pipeline:
    """Every check of `run` and of the stage that it would run first, without training or writing anything.

    Returns:
      A stand-in for the flow that `run` trains: its networks and files, with the weights that training starts from.

    Raises:
      ValueError, FileNotFoundError: see `run`.
    """
    flow = None
    for reflow in unfinished(config, Path(workdir)):
        options = read_options(reflow)
        recipe = check_pairs(reflow.config.pairs, reflow.source, flow) if needs_pairs(reflow.config) else None
        pipe = flow or loading.load(reflow.config.model, options.weights)
        if needs_images(reflow.config):
            images = real_images.check(read_images(reflow.config, options, pipe, recipe), Path(workdir))
            recipe = recipe or images
        trained_dynamics(reflow.config, pipe)
        flow_training.check(options, pipe, recipe, make_loss(reflow.config, options, pipe.nets, pipe.scheduler), {})
        flow = flow_training.as_flow(pipe, pipe.params["unet"])
    return flow


def unfinished(config: ConfigDict, workdir: Path) -> list[Reflow]:
    """The reflows that are left to run, in order; the last one is always among them.

    Raises:
      ValueError: a number of the config is out of its range, `config.path` is unknown, or it forbids a second reflow.
    """
    check_ranges(config)
    if config.path not in PATHS:
        raise ValueError(f"config.path={config.path!r} is not one of {', '.join(PATHS)}")
    if config.path == "sd" and config.k > 2:
        raise ValueError(f"config.k={config.k} needs config.path='flow'; with 'sd' a second reflow is not supported")
    return [
        configure(config, workdir, k)
        for k in range(2, config.k + 1)
        if k == config.k or not loading.has_export(workdir / folder(config, k))
    ]


def configure(config: ConfigDict, workdir: Path, k: int) -> Reflow:
    """The reflow that makes the k-rectified flow; from k = 3 on it begins with the flow before it."""
    alone = copy.deepcopy(config).unlock()  # keeps the references between fields
    del alone.k, alone.later
    if k == 2:
        return Reflow(alone.lock(), workdir / folder(config, k), workdir, ())
    before = workdir / folder(config, k - 1)
    alone.update(config.later.copy_and_resolve_references())
    alone.model = alone.pairs.model = str(before / loading.EXPORT)
    alone.update(loading.AS_EXPORTED)
    return Reflow(alone.lock(), workdir / folder(config, k), before, ("model", "pairs.model"))


def folder(config: ConfigDict, k: int) -> str:
    """The folder of the workdir that the k-rectified flow is trained in: reflow, reflow_3, reflow_4, ..."""
    return config.output if k == 2 else f"{config.output}_{k}"


def is_trained(config: ConfigDict, workdir: str) -> bool:
    """Whether the 2-rectified flow of `config` has been exported."""
    return loading.has_export(Path(workdir) / folder(config, 2))


def need(config: ConfigDict, workdir: str) -> str:
    """The directory of the 2-rectified flow; trains it with `config` if it is missing."""
    source = export_directory(config, workdir)
    if not is_trained(config, workdir):
        print(f"{source} is missing\n→ running reflow first", flush=True)
        run(config, workdir)
    return source


def export_directory(config: ConfigDict, workdir: str) -> str:
    """Where the 2-rectified flow of `config` is, or will be."""
    return str(Path(workdir) / folder(config, 2) / loading.EXPORT)


def read_options(reflow: Reflow) -> flow_training.FlowOptions:
    """Checks and unpacks the config before anything is loaded. Raises ValueError."""
    options = flow_training.read_flow_options(reflow.config)
    fit.check_same_run(options.train, reflow.directory, reflow.chosen)
    return options


# ---------------------------------------------------------------- pairs and real images


def needs_pairs(config: ConfigDict) -> bool:
    """Whether some rows of each batch are pairs. Raises ValueError for a share of less than one image."""
    return real_images.read_share(config.images, config.batch_size) < config.batch_size


def needs_images(config: ConfigDict) -> bool:
    """Whether some rows of each batch are real images. Raises ValueError for a share of less than one image."""
    return real_images.read_share(config.images, config.batch_size) > 0


def has_data(reflow: Reflow, workdir: Path) -> bool:
    """Whether all data that a reflow needs is there."""
    pairs = not needs_pairs(reflow.config) or has_pairs(reflow.source)
    return pairs and (not needs_images(reflow.config) or real_images.has_images(workdir))


def read_images(
    config: ConfigDict,
    options: flow_training.FlowOptions,
    pipe: pipeline.Pipeline,
    recipe: Mapping[str, Any] | None,
) -> real_images.Job:
    """The real images at the size of the pairs, whose recipe is None without any.

    Raises:
      ValueError, FileNotFoundError: see `real_images.read_job`.
    """
    size = config.pairs.height, config.pairs.width
    shape = recipe["latent_shape"] if recipe else loading.latent_shape(pipe.nets, *size)
    return real_images.read_job(config.images, options.weights, pipe, shape)


def need_share(
    config: ConfigDict,
    workdir: Path,
    options: flow_training.FlowOptions,
    pipe: pipeline.Pipeline,
    recipe: Mapping[str, Any] | None,
) -> Share | None:
    """The real images, encoded, and their rows of each batch; None if there are none. Raises as `real_images.need`."""
    if not needs_images(config):
        return None
    job = read_images(config, options, pipe, recipe)
    return Share(real_images.need(job, workdir), real_images.read_share(config.images, config.batch_size))


# ---------------------------------------------------------------- the loss


def make_loss(
    config: ConfigDict,
    options: flow_training.FlowOptions,
    nets: Mapping[str, Net],
    scheduler: Mapping[str, Any],
) -> Loss:
    """The loss of `config.path` and `config.loss`. Raises ValueError for an unknown choice."""
    networks = nets["unet"].with_remat(options.remat["unet"]), nets["text_encoder"]
    chosen = {**config.loss, "prompt_dropout": options.prompt_dropout}
    if config.path == "sd":
        return losses.make_diffusion_loss(*networks, teacher.read_schedule(scheduler), **chosen)
    return losses.make_reflow_loss(*networks, num_timesteps=NUM_TIMESTEPS, **chosen)


def trained_dynamics(config: ConfigDict, pipe: pipeline.Pipeline) -> sampling.Dynamics:
    """What `config.path` makes of the network. Raises ValueError if it keeps a head that the model does not have."""
    if config.path == "flow":
        return flow_training.FLOW
    if isinstance(flow_training.start_dynamics(pipe), sampling.Flow):
        raise ValueError(f"config.path='sd' trains a teacher's own head, but config.model={config.model!r} is a flow")
    return teacher.read_schedule(flow_training.straight_scheduler(pipe.scheduler))
