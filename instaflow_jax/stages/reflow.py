"""Stage `reflow`: pairs → a flow with straight paths (paper, Eq. 5)."""

from collections.abc import Mapping
from pathlib import Path

from ml_collections import ConfigDict

from instaflow_jax import pipeline
from instaflow_jax.models.net import Net
from instaflow_jax.stages.common import fit, flow_training, loading
from instaflow_jax.stages.generate.stage import check_pairs, has_pairs, need_pairs
from instaflow_jax.train import losses
from instaflow_jax.train.step import Loss
from instaflow_jax.weights.conventions import NUM_TIMESTEPS

DIRECTORY = "reflow"


def run(config: ConfigDict, workdir: str) -> None:
    """Trains in `workdir`/reflow on the pairs of `workdir`/pairs, which are generated first if they are missing.

    Raises:
      ValueError, FileNotFoundError: a field of the config, the teacher or the pairs are wrong.
      OSError, FloatingPointError: see `train.loop`.
    """
    options = flow_training.read_flow_options(config)
    fit.check_same_run(options.train, Path(workdir) / DIRECTORY)
    if not has_pairs(Path(workdir)):
        check(config, workdir)
    pairs = need_pairs(config.pairs, Path(workdir))
    pipe = loading.load(config.model, options.weights)
    flow_training.train_flow(options, Path(workdir) / DIRECTORY, pipe, pairs, make_loss(config, options, pipe.nets), {})


def check(config: ConfigDict, workdir: str) -> pipeline.Pipeline:
    """Every check of `run` and of the stage that it would run first, without training or writing anything.

    Returns:
      A stand-in for the flow that `run` trains: its networks and files, with the weights that training starts from.

    Raises:
      ValueError, FileNotFoundError: see `run`.
    """
    options = flow_training.read_flow_options(config)
    fit.check_same_run(options.train, Path(workdir) / DIRECTORY)
    recipe = check_pairs(config.pairs, Path(workdir))
    pipe = loading.load(config.model, options.weights)
    flow_training.check(options, pipe, recipe, make_loss(config, options, pipe.nets), {})
    return flow_training.as_flow(pipe, pipe.params["unet"])


def make_loss(config: ConfigDict, options: flow_training.FlowOptions, nets: Mapping[str, Net]) -> Loss:
    """The loss of `config.loss`. Raises ValueError for an unknown choice."""
    return losses.make_reflow_loss(
        nets["unet"].with_remat(options.remat["unet"]),
        nets["text_encoder"],
        prompt_dropout=options.prompt_dropout,
        num_timesteps=NUM_TIMESTEPS,
        **config.loss,
    )
