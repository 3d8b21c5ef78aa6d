"""Refinement: move the distribution of a flow's images onto that of the data (score distillation, DMD2).

    python -m instaflow_jax.main --config=configs/refine.py --workdir=DIR
    python -m instaflow_jax.main --config=configs/refine.py:sd15 --workdir=DIR
    python -m instaflow_jax.main --config=configs/refine.py:sd15_adversarial --workdir=DIR \\
        --config.model=DIR/refine/export

Needs nothing: a missing flow, DIR/reflow/export, and its pairs in DIR/refine/pairs are made first. Writes
DIR/refine/export, for one and a few steps. `config.model` may name another flow, or a one-step model to start from. The
real score is the teacher's; with --config.real='' a flow that knows the distribution of its images, made first if it is
missing: DIR/score/export, by `configs/reflow.py:score`.
Measured on two CPU cores that other work shared (2026-11-27), from the demo's models: 12,288 pairs in 2 min, 560 steps
in 8 min. Fréchet distance to real emoji by names, kinds and latents: 3.1, 13.9 and 7.0 at one step, 2.9, 12.4 and 6.0
at two, where distillation has 3.1, 14.9 and 5.3 at one, 3.8, 11.4 and 20.2 at two. Not yet measured: SD 1.5.
"""

from ml_collections import ConfigDict

from configs import common, distill, reflow


def get_config(variant: str = "openmoji") -> ConfigDict:
    config = reflow.training()
    config.stage = "refine"
    config.model = ""  # the flow to start from; "" is DIR/reflow/export
    # What knows the data's score: a teacher, or a flow trained with fresh noise; "" is DIR/score/export, made with
    # config.score if missing. alpha: its guidance.
    config.real, config.alpha = "openmoji", 1.0
    config.N = (1,)  # numbers of steps that the student is refined for
    config.output = "refine"  # folder of the workdir to train in
    config.prompt_dropout = 0.0  # because a one-step model is not guided
    config.t = (0.02, 0.98)  # scores are compared at times between these
    config.matching = 1.0  # weight of the difference of scores
    config.regression = 0.0  # share of each batch that regresses the pairs' images from their noise instead
    config.adversarial = 0.0  # weight of the discriminator's verdict; 0 goes without it
    # The fake score. updates: for each of the student's. first: steps before the student's first update. adversarial:
    # weight of the discriminator's loss.
    config.fake = {"updates": 2, "first": 20, "adversarial": 0.0, "schedule": {}}
    # Pairs by the flow of the distillation: their prompts are drawn, and `regression` goes on with them. model: that
    # flow; "" is DIR/reflow/export. pairs_folder: folder of the workdir that holds pairs/.
    config.pairs = distill.get_config("sd15_l2" if variant.startswith("sd15") else "openmoji").pairs
    config.pairs.model = ""
    config.pairs_folder = "reflow"
    config.reflow = reflow.get_config("sd15" if variant.startswith("sd15") else "openmoji")
    config.score = reflow.get_config("sd15_score" if variant.startswith("sd15") else "score")
    config.images = config.score.images  # real images for the score and the discriminator; share: the score's
    config.eval.N = (1, 2, 4)
    common.pick(VARIANTS, variant)(config)
    return config.lock()


def openmoji(config: ConfigDict) -> None:
    """On pairs of their own, whose prompts name only a kind more often: there distillation is worst."""
    config.pairs_folder, config.pairs.seed, config.pairs.prompts.source = "refine", 2, "openmoji_kinds"
    reflow.emoji_budget(config, steps=560)
    config.regression = 0.5
    config.schedule.update({"peak": 2e-4, "warmup_steps": 10})
    config.fake.update({"first": 60, "schedule": {"name": "constant", "peak": 2e-4, "warmup_steps": 10}})
    config.loop.save_every = 100
    config.eval_every = 560


def sd15(config: ConfigDict) -> None:
    """DMD2's recipe for SD 1.5 without its discriminator (github.com/tianweiy/DMD2, experiments/sdv1.5).

    From there: batch 2048, one update of the student to ten of the fake score, rate 1e-5 for both, clipping at 10,
    39,000 updates of the fake score, the teacher's score with guidance 1.75. They start from the teacher; we start from
    the 2-rectified flow, which should need fewer updates: how many is not known. Our own: EMA, weight decay, `first`.
    """
    config.real, config.alpha = common.SD15, 1.75
    config.dtype = "bfloat16"
    config.remat.unet = "blocks"
    config.batch_size, config.accumulate = 2048, 32  # 8 samples per device and micro-batch on 8 devices
    config.ema_decay = 0.999
    config.optim.update({"weight_decay": 0.01, "clip": 10.0})
    config.schedule = {"name": "constant", "peak": 1e-5, "warmup_steps": 0}
    config.fake.update({"updates": 10, "first": 10, "schedule": {"name": "constant", "peak": 1e-5, "warmup_steps": 0}})
    config.loop.update({"steps": 3900, "save_every": 100})
    config.eval_every = 100
    config.eval.prompts = reflow.SD_PROMPTS


def sd15_adversarial(config: ConfigDict) -> None:
    """DMD2's second phase, with the discriminator: set `config.model` to the DIR/refine/export of the first.

    From there: rate 5e-7 for both, weights 1e-3 and 1e-2. Its number of updates is not in the script.
    """
    sd15(config)
    config.output = "refine_adversarial"
    config.schedule.peak = config.fake.schedule.peak = 5e-7
    config.adversarial, config.fake.adversarial = 1e-3, 1e-2
    config.loop.steps = 500


VARIANTS = {"openmoji": openmoji, "sd15": sd15, "sd15_adversarial": sd15_adversarial}
