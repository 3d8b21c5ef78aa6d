"""A ControlNet for a flow, which makes it follow outlines.

    python -m instaflow_jax.main --config=configs/control.py --workdir=DIR
    python -m instaflow_jax.main --config=configs/sample.py --config.model=DIR/distill/export --config.N=1 \\
        --config.alpha=1.0 --config.controls=DIR/control/export --config.prompts='an animal' \\
        --config.conditions=DIR/control/outlines/an-animal.png

Needs nothing: missing pairs and a missing flow are made first. The flow's U-Net stays frozen; the ControlNet starts as
its encoder with zero convolutions, and learns Eq. 5 with the outlines of the pairs' images and fresh noise. Writes
DIR/control/export, which every model of the same architecture takes, and some outlines beside it.

Measured on two shared CPU cores: 1,000 steps in 7 min 49 s. Mean error of the outline 0.203 without the ControlNet,
0.126 with it at one step, 0.105 at 25.
"""

from ml_collections import ConfigDict

from configs import common, reflow

KINDS = ("a face", "a person", "an animal", "a flag")  # which leave the shape open


def get_config(variant: str = "openmoji") -> ConfigDict:
    config = reflow.network()
    config.stage = "control"
    config.model = ""  # the flow; "" is DIR/reflow/export
    config.output = "control"  # folder of the workdir to train in
    config.loss = {"time": "uniform", "penalty": "squared", "noise": "fresh"}  # or u_shaped, pseudo_huber, paired
    config.channels = (16, 32, 64)  # of the convolutions on the outline; each after the first halves it
    config.threshold = 0.25  # of the gradient's share of that between black and white, above which there is a line
    config.reflow = reflow.get_config()
    config.pairs = config.reflow.pairs
    common.pick(VARIANTS, variant)(config)
    return config.lock()


def openmoji(config: ConfigDict) -> None:
    reflow.emoji_budget(config, steps=1000)
    config.prompt_dropout = 0.5  # a full name says nearly all; without one the outline has to be followed
    config.eval.prompts = KINDS
    config.eval_every = 500
    config.eval.N = (1, 25)


VARIANTS = {"openmoji": openmoji}
