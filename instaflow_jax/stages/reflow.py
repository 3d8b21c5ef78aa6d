"""Stage `reflow`: pairs → a flow with straight paths (paper, Eq. 5)."""

from pathlib import Path

from ml_collections import ConfigDict

from instaflow_jax.stages.common import flow_training, loading
from instaflow_jax.stages.generate.stage import need_pairs
from instaflow_jax.train import losses
from instaflow_jax.weights.conventions import NUM_TIMESTEPS

DIRECTORY = "reflow"


def run(config: ConfigDict, workdir: str) -> None:
    """Trains in `workdir`/reflow on the pairs of `workdir`/pairs, which are generated first if they are missing.

    Raises:
      ValueError, FileNotFoundError: a field of the config, the teacher or the pairs are wrong.
      OSError, FloatingPointError: see `train.loop`.
    """
    options = flow_training.read_flow_options(config)
    pairs = need_pairs(config.pairs, Path(workdir))
    pipe = loading.load(config.model, options.weights)
    loss = losses.make_reflow_loss(
        pipe.nets["unet"].with_remat(options.remat["unet"]),
        pipe.nets["text_encoder"],
        prompt_dropout=options.prompt_dropout,
        num_timesteps=NUM_TIMESTEPS,
        **config.loss,
    )
    flow_training.train_flow(options, Path(workdir) / DIRECTORY, pipe, pairs, loss, {})
