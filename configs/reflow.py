"""Reflow: fit a velocity to the straight lines of the teacher's pairs (paper, Eq. 5).

    python -m instaflow_jax.main --config=configs/reflow.py --workdir=DIR
    python -m instaflow_jax.main --config=configs/reflow.py --workdir=DIR --config.k=3                # and once more
    python -m instaflow_jax.main --config=configs/reflow.py:sd15 --workdir=DIR        # the paper's first stage
    python -m instaflow_jax.main --config=configs/reflow.py:sd15_2 --workdir=DIR      # its second
    python -m instaflow_jax.main --config=configs/reflow.py:score --workdir=DIR       # for configs/refine.py
    python -m instaflow_jax.main --config=configs/reflow.py:diffusion --workdir=DIR   # a teacher with straight paths
    python -m instaflow_jax.main --config=configs/reflow.py --workdir=DIR --config.images.source=FOLDER  # real images

Needs nothing: missing pairs are generated first. Writes DIR/reflow/export, which `configs/sample.py` samples from.
That is the 2-rectified flow. With --config.k=3 its own pairs follow, in DIR/reflow/pairs (`configs/distill.py` uses
them too), and from them the 3-rectified flow, DIR/reflow_3/export; with k=4 DIR/reflow_3/pairs and DIR/reflow_4/export.
What exists is used as it is. `configs/evaluate.py` compares all of them. To distil the 3-rectified flow:

    python -m instaflow_jax.main --config=configs/distill.py --workdir=DIR --config.model=DIR/reflow_3/export \\
        --config.pairs_folder=reflow_3 --config.output=distill_3

Measured on two CPU cores with --cpu_devices=2 (by configs/demo.py): 1,500 steps of 32 in 6 min 27 s, 136 samples/s.
S of the teacher, treated as a flow, is 0.193; S of this flow is 0.022. Fréchet distance to real emoji at one step: 3.5,
the teacher's 28.8. The 3-rectified flow: docs/training.md. Not yet run: the paper's variants (`plan` compiled them).
"""

from ml_collections import ConfigDict, config_dict

from configs import common, generate

PROMPTS = ("woman astronaut", "red apple", "cat face", "house", "astronaut", "a face")
SD_PROMPTS = ("a hyper-realistic photo of a cute cat", "an astronaut riding a horse on mars")


def get_config(variant: str = "openmoji") -> ConfigDict:
    config = training()
    config.stage = "reflow"
    config.path = "flow"  # or sd: keep the teacher's head and schedule, for a Stable Diffusion of straight paths
    config.loss = {"time": "uniform", "penalty": "squared", "noise": "paired"}  # or those of train/losses.py
    config.output = "reflow"  # folder of the workdir to train in; later reflows add their k
    # Real images with captions, which take a share of each batch, with fresh noise: flow matching. source: a directory
    # (captions in metadata.jsonl, or NAME.txt beside each image) or tfds:NAME; "" is none. column: of the captions in
    # metadata.jsonl or the TFDS set. split: of the TFDS set. batch: images per device and call of the encoder.
    config.images = {"source": "", "column": "text", "split": "train", "share": 0.25, "batch": 16}
    config.k = 2  # of the k-rectified flow to end with: it takes k − 1 reflows of the teacher
    common.pick(VARIANTS, variant)(config)
    return config.lock()


def training() -> ConfigDict:
    """What the stages that train a flow share."""
    config = network()
    config.warm_start = False  # convert a teacher's weights to a flow's sign and timesteps before the first step
    config.lora = lora()
    return config


def network() -> ConfigDict:
    """What they share with the training of a ControlNet; it starts from the weights `config.model`."""
    config = common.weights()
    config.update(common.training())
    config.schedule = {"name": "constant", "peak": 1e-6, "warmup_steps": 1000}
    config.remat = {"unet": "none"}  # or attention, blocks: what the backward pass recomputes to save memory
    config.prompt_dropout = 0.1  # share of prompts replaced by the empty one, which keeps guidance possible
    config.eval = {"prompts": PROMPTS, "seeds": 2, "N": (1, 2, 4, 25), "alpha": 1.0}  # the grid; S takes the largest N
    return config


def lora() -> ConfigDict:
    """Adapters that are trained in place of all weights; `rank` turns them on."""
    config = ConfigDict()
    config.rank = config_dict.placeholder(int)
    config.alpha = config_dict.placeholder(float)  # each layer's scale is alpha/rank; None is `rank`
    # Patterns (regular expressions) of the last words of the layers' names, linear layers and convolutions alike.
    config.targets = ("to_q", "to_k", "to_v", r"to_out\.0")
    config.ranks = ()  # 'PATTERN=RANK' of layers with another rank; the first that matches counts
    return config


def openmoji(config: ConfigDict) -> None:
    config.model = "openmoji"
    config.pairs = generate.get_config("openmoji")
    emoji_budget(config, steps=1500)
    config.warm_start = True
    config.prompt_dropout = 0.05
    config.later = later(flow_pairs(), steps=1500, peak=3e-4)


def flow_pairs() -> ConfigDict:
    """Pairs by a flow of emoji: straight paths need few steps, which leaves time for more pairs."""
    pairs = generate.get_config("openmoji")
    pairs.update({"dynamics": "flow", "alpha": 1.0, "N": 8, "count": 12288})  # the teacher's pairs were already guided
    return pairs


def later(pairs: ConfigDict, *, steps: int, peak: float) -> ConfigDict:
    """What differs in each reflow after the first, whose pairs the flow before it makes."""
    return ConfigDict({"pairs": pairs, "loop": {"steps": steps}, "schedule": {"peak": peak}})


def emoji_budget(config: ConfigDict, steps: int) -> None:
    """For a few minutes on two CPU cores: few steps with a high learning rate that falls to 0 at the last step."""
    config.batch_size = 32
    config.loop.update({"steps": steps, "save_every": 250})
    config.ema_decay = 0.99
    config.schedule = common.cosine(config, peak=1e-3, warmup_steps=50, end=0.0)
    config.eval_every = 600


def score(config: ConfigDict) -> None:
    """The distribution of the pairs' images, for `configs/refine.py`: the same pairs with fresh noise.

    Or, with `config.images.source`, that of the real images alone; then no pairs are needed.
    """
    openmoji(config)
    config.loss.noise, config.output, config.images.share = "fresh", "score", 1.0
    config.loop.steps = 400


def diffusion(config: ConfigDict) -> None:
    """Rectified diffusion (arXiv 2410.07303): the product is a teacher, which DDIM samples in few steps."""
    openmoji(config)
    config.path, config.loss.penalty, config.output = "sd", "elementwise_huber", "diffusion"
    config.warm_start = False  # the head stays as it is


def sd15(config: ConfigDict) -> None:
    """SD 1.5, 70,000 steps of 64; raise `accumulate` on fewer devices than the batch needs."""
    config.model = common.SD15
    config.pairs = generate.get_config("sd15")
    config.dtype = "bfloat16"
    config.remat.unet = "blocks"  # none takes a fifth less arithmetic where it fits, as on 80 GB (docs/hardware.md)
    config.loop.update({"steps": 70_000, "save_every": 2500})
    config.later = later(generate.get_config("rf2"), steps=25_000, peak=1e-7)  # the paper's rate; its steps are unknown
    config.eval_every = 2500
    config.eval.prompts = SD_PROMPTS


def sd15_2(config: ConfigDict) -> None:
    """The second stage, 25,000 steps of 1024; set `config.model` to the DIR/reflow/export of the first."""
    sd15(config)
    config.batch_size, config.accumulate = 1024, 16  # 8 samples per device and micro-batch on 8 devices
    config.loop.steps = 25_000


def sd15_score(config: ConfigDict) -> None:
    """`score` at SD 1.5's size. How long it has to train is not known: nobody has published this step."""
    sd15(config)
    config.loss.noise, config.output, config.images.share = "fresh", "score", 1.0
    config.warm_start = True
    config.loop.steps = 10_000


def sd15_diffusion(config: ConfigDict) -> None:
    """`diffusion` at SD 1.5's size, with that paper's settings: rate 5e-6, weight decay 1e-3, 200,000 steps of 128."""
    sd15(config)
    config.path, config.loss.penalty, config.output = "sd", "elementwise_huber", "diffusion"
    config.batch_size = 128
    config.optim.weight_decay, config.schedule.peak = 1e-3, 5e-6
    config.loop.steps = 200_000


VARIANTS = {"openmoji": openmoji, "score": score, "diffusion": diffusion, "sd15": sd15, "sd15_2": sd15_2}
VARIANTS |= {"sd15_score": sd15_score, "sd15_diffusion": sd15_diffusion}
