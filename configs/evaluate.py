"""Quality, speed and straightness of teacher, rectified flows and few-step models, in one table.

    python -m instaflow_jax.main --config=configs/evaluate.py --workdir=DIR --cpu_devices=2
    python -m instaflow_jax.main --config=configs/evaluate.py --workdir=DIR --config.extra='distill300|direct300'
    python -m instaflow_jax.main --config=configs/evaluate.py:coco5k --workdir=DIR       # the paper's protocols:
    python -m instaflow_jax.main --config=configs/evaluate.py:coco30k --workdir=DIR      # see configs/evaluate_coco.py

The first command evaluates the embedded world: the teacher, and those of DIR/reflow/export, DIR/reflow_K/export (later
reflows), DIR/distill/export, DIR/distill_lpips/export, DIR/direct/export, DIR/consistency/export, DIR/refine/export,
DIR/stacked/export (also stacked_lpips and stacked_direct) and DIR/progressive_N/export (each at its own N steps) that
exist. It writes DIR/evaluate/: results.json, table.md, few_steps.png, straightness.png (S by k), guidance.png,
trajectories.png and grid.png. A second run measures only what is new, such as another model or another number of steps.

All rows use the same prompts (full emoji names, without replacement) and the same noise, of a seed that no pairs used.
Needs the package `matplotlib` (extra "demo") and the packages that draw the emoji.
Measured by configs/demo.py on two CPU cores (version 0.1): 5 min 13 s for 512 prompts of names and as many of kinds.
"""

from ml_collections import ConfigDict

from configs import common, evaluate_coco

PROMPTS = ("woman astronaut", "red apple", "cat face", "house", "rocket", "grinning face", "octopus", "flag of japan")
COCO = {"coco5k": evaluate_coco.coco5k, "coco30k": evaluate_coco.coco30k}


def get_config(variant: str = "openmoji") -> ConfigDict:
    change = common.pick({"openmoji": None} | COCO, variant)
    if change is None:
        return openmoji().lock()
    config = evaluate_coco.base()
    change(config)
    return config.lock()


def openmoji() -> ConfigDict:
    config = ConfigDict()
    config.stage = "evaluate"
    config.check = False  # true only makes every check that needs no long computation
    config.teacher = {"model": "openmoji", "alpha": 0.0, "N": (25, 8, 4, 2, 1)}  # alpha 0: that of DIR/pairs
    config.reflow = {"alpha": 1.0, "N": (25, 8, 4, 2, 1)}  # of later reflows too
    config.distill = {"alpha": 1.0, "N": (1, 2, 4, 8)}  # of consistency and refine too
    config.distill_lpips = {"alpha": 1.0, "N": (1, 2, 4)}
    config.direct = {"alpha": 1.0, "N": (1,)}
    config.stacked = {"alpha": 1.0, "N": (1,)}  # of every Stacked U-Net
    config.extra = ""  # other folders of the workdir, NAME|NAME, each with export/; evaluated like distill
    config.judge = "openmoji"  # embedded model or directory with clip/ and lpips/
    config.data_dir = ""  # holds the emoji, or they are drawn there; "" is WORKDIR/data
    config.count = 512  # prompts; a Fréchet distance depends on it
    config.seed = 101  # draws the prompts and the noise; the next two draw other noise
    config.neighbours = 3  # k of precision and recall
    config.straightness = {"N": 25, "count": 128}  # Euler steps and samples for S
    config.guidance = {"N": 4, "alphas": (1.0, 1.5, 2.0, 3.0, 4.0)}  # for the 2-rectified flow
    config.show = {"prompts": PROMPTS, "path": "woman astronaut", "points": 6}  # for the grid; for the trajectories
    config.batch = 16  # images a device and call of the compiled program
    config.repeats = 51  # runs; the seconds per image are their median
    return config
