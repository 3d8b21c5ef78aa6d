"""Progressive distillation: a flow of few steps from a teacher, whose steps are halved round by round.

    python -m instaflow_jax.main --config=configs/progressive.py --workdir=DIR --cpu_devices=2
    python -m instaflow_jax.main --config=configs/progressive.py:sd15 --workdir=DIR     # the literature's schedule

The rival that the paper's Table 1 quotes. Needs nothing: missing pairs are generated first, of which only the images
and prompts are used. Writes a flow for N steps to DIR/progressive_N/export for each N of `config.rounds`, the last for
one step. A run that was killed continues within its round. `configs/evaluate.py` compares them with the others; to
sample:

    python -m instaflow_jax.main --config=configs/sample.py --config.model=DIR/progressive_4/export --config.N=4 \\
        --config.alpha=1.0

The first round folds the teacher's guidance into one network and halves the steps at once, at nearly twice the cost of
a later one. The embedded recipe takes as many training samples as reflow and distillation of the demo, 2,400 × 32.
Fréchet distance to real emoji at 1 / 2 / 4 steps: 6.7 / 6.7 / 6.6, where reflow and distillation have 3.4 at one step
(docs/training.md). Not yet measured: `:sd15` (`plan` has compiled its first round).
"""

from ml_collections import ConfigDict

from configs import common, generate, reflow


def get_config(variant: str = "openmoji") -> ConfigDict:
    config = reflow.training()
    config.stage = "progressive"
    del config.loop.steps  # config.rounds has them
    config.prompt_dropout = 0.0  # because the students are not guided
    config.warm_start = True
    config.eval.N = (1, 2, 4)
    common.pick(VARIANTS, variant)(config)
    config.alpha = config.pairs.get_ref("alpha")  # guidance of the teacher `config.model` in the first round
    return config.lock()


def openmoji(config: ConfigDict) -> None:
    config.model = "openmoji"
    config.pairs = generate.get_config("openmoji")
    # N: steps of each round's student; steps: training steps of each round
    config.rounds = {"N": (16, 8, 4, 2, 1), "steps": (800, 300, 300, 400, 600)}
    config.batch_size = 32
    config.loop.save_every = 100
    config.ema_decay = 0.99
    config.schedule = {"name": "cosine", "peak": 1e-3, "warmup_steps": 50, "end": 0.0}  # falls over each round
    config.eval_every = 600


def sd15(config: ConfigDict) -> None:
    """SD 1.5 from 128 steps of the teacher.

    Salimans & Ho (arXiv 2202.00512): 50,000 updates a round, 100,000 for two steps and for one (section 5.2), batches
    of 128, Adam at 5e-5 falling to 0 in each round, no EMA, weight max(SNR, 1). Their rate falls linearly, ours by a
    cosine; they start at 1,024 steps or more. Meng et al. (arXiv 2210.03142) fold guidance into the network in a stage
    of its own and for a range of scales; here the first round does it, for one scale.
    """
    config.model = common.SD15
    config.pairs = generate.get_config("sd15")
    config.rounds = {"N": (64, 32, 16, 8, 4, 2, 1), "steps": (50_000,) * 5 + (100_000,) * 2}
    config.dtype = "bfloat16"
    config.remat.unet = "blocks"
    config.batch_size, config.accumulate = 128, 2  # 8 samples per device and micro-batch on 8 devices
    config.ema_decay = 0.0
    config.loop.save_every = 2500
    config.schedule = {"name": "cosine", "peak": 5e-5, "warmup_steps": 0, "end": 0.0}
    config.eval_every = 2500
    config.eval.prompts = reflow.SD_PROMPTS


VARIANTS = {"openmoji": openmoji, "sd15": sd15}
