"""Stage `reflow`: pairs → a flow whose paths are straight (paper, Eq. 5)."""

from pathlib import Path

from ml_collections import ConfigDict

from instaflow_jax.stages.common import flow_training as straighten
from instaflow_jax.stages.common import loading
from instaflow_jax.train import losses

DIRECTORY = "reflow"


def run(config: ConfigDict, workdir: str) -> None:
    """Trains in `workdir`/reflow on the pairs of `workdir`/pairs, which are made first if they are not there.

    Raises:
      ValueError, FileNotFoundError: a field of the config, the teacher or the pairs are wrong.
      OSError, FloatingPointError: see `train.loop`.
    """
    straighten.check(config)
    pairs = straighten.need_pairs(config.pairs, Path(workdir))
    pipe = loading.load(config.model, loading.read_weight_options(config))
    unet = pipe.nets["unet"].with_remat(config.remat.unet)
    loss = losses.make_reflow_loss(
        unet,
        pipe.nets["text_encoder"],
        prompt_dropout=config.prompt_dropout,
        num_timesteps=straighten.NUM_TIMESTEPS,
        **config.loss,
    )
    straighten.fit(config, Path(workdir) / DIRECTORY, pipe, pairs, loss, {})
