"""Distillation: turn the straightened flow into a one-step model (paper, Eq. 6), by L2 first, then by LPIPS.

    python -m instaflow_jax.main --config=configs/distill.py --workdir=DIR
    python -m instaflow_jax.main --config=configs/distill.py:lpips --workdir=DIR --config.init_from=DIR/distill/export
    python -m instaflow_jax.main --config=configs/distill.py:direct --workdir=DIR     # the paper's failing baseline
    python -m instaflow_jax.main --config=configs/distill.py:stacked --workdir=DIR    # InstaFlow-1.7B's two U-Nets
    python -m instaflow_jax.main --config=configs/distill.py:consistency --workdir=DIR \\
        --config.init_from=DIR/distill/export                                         # for 1, 2, 4 and 8 steps
    python -m instaflow_jax.main --config=configs/distill.py:sd15_l2 --workdir=DIR
    python -m instaflow_jax.main --config=configs/distill.py:sd15_lpips --workdir=DIR \\
        --config.init_from=DIR/distill/export
    python -m instaflow_jax.main --config=configs/distill.py:sd15_stacked_l2 --workdir=DIR
    python -m instaflow_jax.main --config=configs/distill.py:sd15_stacked_lpips --workdir=DIR \\
        --config.init_from=DIR/stacked/export

Needs nothing: a missing flow and missing pairs are made first. Writes a one-step generator to DIR/distill/export
(or DIR/direct/export, DIR/distill_lpips/export, DIR/stacked/export, DIR/stacked_lpips/export, DIR/consistency/export).
Measured on two CPU cores with --cpu_devices=2 (by configs/demo.py): 12,288 pairs of the flow and 900 steps of 32 in
5 min 42 s. Fréchet distance to real emoji at one step: 3.1 (the flow 3.5, direct distillation 3.1, the teacher at 25
steps 2.8); for prompts that name only a kind of emoji: 14.9 (26.3, 16.2, 8.6). The Stacked U-Net, consistency and
shorter runs: docs/training.md. Not yet measured: the paper's variants and `:sd15_consistency`.
"""

from ml_collections import ConfigDict

from configs import common, generate, reflow


def get_config(variant: str = "openmoji") -> ConfigDict:
    config = reflow.training()
    config.stage = "distill"
    config.model = ""  # the flow that makes the pairs; "" is DIR/reflow/export
    config.init_from = ""  # weights to start from; "" is config.model
    config.pairs_folder = "reflow"  # folder of the workdir that holds pairs/
    config.output = "distill"  # folder of the workdir to train in
    config.prompt_dropout = 0.0  # because a one-step model is not guided
    config.distance = "l2"  # of the latents, or lpips
    config.penalty = "squared"  # on errors of latents and velocities; or those of train/losses.py
    # model: embedded name or directory with lpips/. trunk, heads, net: instead of it, torchvision's vgg16 or alexnet
    # .pth and the lpips package's heads. l2: weight of the squared error that is added. crop, margin: latents per side
    # of the random crop that is compared, and around it; 0 compares the complete image.
    config.lpips = {"model": "openmoji", "trunk": "", "heads": "", "net": "vgg", "l2": 0.0, "crop": 0, "margin": 0}
    config.remat.update({"vae": "none", "lpips": "none"})  # or attention, blocks
    # enabled: two U-Nets in series, both from the weights to start from, unless those are a Stacked U-Net's already.
    # second: another model whose U-Net half 2 starts from. middle_norm: keep half 1's last GroupNorm and SiLU.
    config.stacked = {"enabled": False, "second": "", "middle_norm": True}
    config.match = 0.0  # share of each batch that keeps matching velocities at t > 0, for use at 2 and 4 steps
    config.consistency = ()  # numbers of steps to be used with, as in (1, 2, 4, 8): a loss of its own in place of Eq. 6
    config.reflow = reflow.get_config("sd15" if variant.startswith("sd15") else "openmoji")
    config.eval.N = (1, 2, 4)
    common.pick(VARIANTS, variant)(config)
    return config.lock()


def openmoji(config: ConfigDict) -> None:
    config.pairs = reflow.flow_pairs()
    reflow.emoji_budget(config, steps=900)
    config.penalty = "pseudo_huber"
    config.warm_start = True


def lpips(config: ConfigDict) -> None:
    """The second phase: 400 steps of 32 on LPIPS of complete images, from the L2 model `config.init_from`."""
    openmoji(config)
    config.distance, config.output = "lpips", "distill_lpips"
    config.loop.steps = 400
    config.schedule.peak = 3e-4


def direct(config: ConfigDict) -> None:
    """Distillation of the teacher's own pairs, without reflow."""
    openmoji(config)
    config.model = "openmoji"
    config.pairs = config.reflow.pairs
    config.pairs_folder, config.output = "", "direct"


def consistency(config: ConfigDict) -> None:
    """300 steps of 32, for sampling in 1, 2, 4 and 8 steps, from the one-step model `config.init_from`."""
    openmoji(config)
    config.consistency, config.penalty, config.output = (1, 2, 4, 8), "squared", "consistency"
    config.loop.steps = 300
    config.schedule.peak = 3e-4


def stacked(config: ConfigDict) -> None:
    """The Stacked U-Net from the same flow and pairs as `openmoji`, with the same number of steps."""
    openmoji(config)
    config.stacked.enabled, config.output = True, "stacked"


def sd15_l2(config: ConfigDict) -> None:
    """21,500 steps of 1024 from the 2-rectified flow, whose pairs take 25 Euler steps at alpha 1.5."""
    config.pairs = generate.get_config("rf2")
    config.dtype = "bfloat16"
    config.remat.unet = "blocks"
    config.batch_size, config.accumulate = 1024, 16  # 8 samples per device and micro-batch on 8 devices
    config.loop.update({"steps": 21_500, "save_every": 1000})


def sd15_lpips(config: ConfigDict) -> None:
    """18,000 steps of 1024 on the same pairs, with VGG16 on crops of 32 latents (the paper names neither).

    Needs torchvision's vgg16 state dict and the lpips package's weights/v0.1/vgg.pth: `--config.lpips.trunk`, `.heads`.
    """
    sd15_l2(config)
    config.distance, config.output = "lpips", "distill_lpips"
    config.remat.update({"vae": "blocks", "lpips": "blocks"})
    config.lpips.update({"trunk": "vgg16.pth", "heads": "vgg.pth", "crop": 32, "margin": 2})
    config.loop.steps = 18_000


def sd15_consistency(config: ConfigDict) -> None:
    """20,000 steps of 128 at 5e-6 with weight decay 1e-3.

    Rate, weight decay and steps are those of rectified diffusion's phased consistency stage (arXiv 2410.07303, the
    released script); the batch is its first stage's, since the script gives only 20 a GPU.
    """
    sd15_l2(config)
    config.consistency, config.output = (1, 2, 4, 8), "consistency"
    config.batch_size, config.accumulate = 128, 2
    config.optim.weight_decay, config.schedule.peak = 1e-3, 5e-6
    config.loop.steps = 20_000


def sd15_stacked_l2(config: ConfigDict) -> None:
    """InstaFlow-1.7B's first phase: 110,000 steps of 64, both halves from the 2-rectified flow."""
    sd15_l2(config)
    config.stacked.enabled, config.output = True, "stacked"
    config.batch_size, config.accumulate = 64, 1
    config.loop.update({"steps": 110_000, "save_every": 2500})


def sd15_stacked_lpips(config: ConfigDict) -> None:
    """Its second phase: 2,500 steps of 320; set `config.init_from` to the DIR/stacked/export of the first."""
    sd15_lpips(config)
    config.stacked.enabled, config.output = True, "stacked_lpips"
    config.batch_size, config.accumulate = 320, 5
    config.loop.steps = 2500


VARIANTS = {"openmoji": openmoji, "lpips": lpips, "direct": direct, "stacked": stacked}
VARIANTS |= {"consistency": consistency, "sd15_consistency": sd15_consistency}
VARIANTS |= {"sd15_l2": sd15_l2, "sd15_lpips": sd15_lpips}
VARIANTS |= {"sd15_stacked_l2": sd15_stacked_l2, "sd15_stacked_lpips": sd15_stacked_lpips}
