"""Reflow: fit a velocity to the straight lines of the teacher's pairs (paper, Eq. 5).

    python -m instaflow_jax.main --config=configs/reflow.py --workdir=DIR
    python -m instaflow_jax.main --config=configs/reflow.py:sd15 --workdir=DIR        # the paper's first stage
    python -m instaflow_jax.main --config=configs/reflow.py:sd15_2 --workdir=DIR      # its second

Needs nothing: pairs that are absent are generated first. Writes DIR/reflow/export, which `configs/sample.py` draws from.
Measured on two CPU cores with --cpu_devices=2 (by configs/demo.py): 1,500 steps of 32 in 6 min 27 s, 136 samples/s. S of
the teacher, seen as a flow, 0.463; of this flow 0.029. Fréchet distance to real emoji at one step 3.7, the teacher's 46.5.
The paper's variants have not been run; sd15 has been compiled at full size (benchmarks/scaling.py).
"""

from ml_collections import ConfigDict

from configs import common, generate

PROMPTS = ("woman astronaut", "red apple", "cat face", "house", "astronaut", "a face")


def get_config(variant: str = "openmoji") -> ConfigDict:
    config = training()
    config.stage = "reflow"
    config.loss = {"time": "uniform", "penalty": "squared"}  # or u_shaped, pseudo_huber
    common.pick(VARIANTS, variant)(config)
    return config.lock()


def training() -> ConfigDict:
    """What reflow and distillation share; `config.model` is whose weights they start from."""
    config = common.weights()
    config.seed = 0
    config.batch_size = 64  # of all devices together
    config.accumulate = 1  # micro-batches a batch is cut into
    config.fsdp = 1  # devices that hold one copy of the state between them
    config.remat = {"unet": "none"}  # or attention, blocks: what the backward pass computes again to save memory
    config.warm_start = False  # give a teacher's weights a flow's sign and clock before the first step
    config.prompt_dropout = 0.1  # share of prompts replaced by the empty one, which keeps guidance possible
    config.ema_decay = 0.9999
    config.optim = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "clip": 1.0}
    config.schedule = {"name": "constant", "peak": 1e-6, "warmup_steps": 1000}
    config.loop = {"steps": 1, "log_every": 50, "save_every": 1000, "max_skipped": 10, "profile_steps": (0, 0)}
    config.checkpoints = {"keep_last": 2, "keep_every": 0}
    config.eval_every = 1000  # steps between grids
    config.eval = {"prompts": PROMPTS, "seeds": 2, "N": (1, 2, 4, 25), "alpha": 1.0}
    config.tensorboard = True
    return config


def openmoji(config: ConfigDict) -> None:
    config.model = "openmoji"
    config.pairs = generate.get_config("openmoji")
    emoji_budget(config, steps=1500)
    config.prompt_dropout = 0.05


def emoji_budget(config: ConfigDict, steps: int) -> None:
    """What two CPU cores manage in some minutes: few steps, large ones, the learning rate down to 0 at the last."""
    config.batch_size = 32
    config.warm_start = True
    config.loop.update({"steps": steps, "save_every": 250})
    config.ema_decay = 0.99
    config.schedule = {
        "name": "cosine",
        "peak": 1e-3,
        "warmup_steps": 50,
        "total_steps": config.loop.get_ref("steps"),
        "end": 0.0,
    }
    config.eval_every = 600


def sd15(config: ConfigDict) -> None:
    """SD 1.5, 64 × 70,000; on fewer devices than the batch needs, raise `accumulate`."""
    config.model = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    config.pairs = generate.get_config("sd15")
    config.dtype = "bfloat16"
    config.remat.unet = "blocks"
    config.loop.update({"steps": 70_000, "save_every": 2500})
    config.eval_every = 2500
    config.eval.prompts = ("a hyper-realistic photo of a cute cat", "an astronaut riding a horse on mars")


def sd15_2(config: ConfigDict) -> None:
    """The second stage, 1024 × 25,000; `config.model` is the first one's DIR/reflow/export."""
    sd15(config)
    config.batch_size, config.accumulate = 1024, 16  # 8 samples a device and micro-batch on 8 devices
    config.loop.steps = 25_000


VARIANTS = {"openmoji": openmoji, "sd15": sd15, "sd15_2": sd15_2}
