"""The complete method on the embedded world, from the teacher's pairs to a report.

    launch/demo.sh                                                       # installs, then runs this:
    python -m instaflow_jax.main --config=configs/demo.py --workdir=DIR --cpu_devices=2
    python -m instaflow_jax.main --config=configs/demo.py:full --workdir=DIR --cpu_devices=2    # and the paper's rest

Pairs → reflow → distillation → distillation without reflow (the paper's baseline) → evaluation → export →
DIR/report.html. It may be killed at any moment; started again it continues and reuses what has finished. The config of
every stage is part of this one: `--config.reflow.loop.steps=2000`, `--config.generate.count=8192`. `:full` adds the
3-rectified flow, an LPIPS phase, the Stacked U-Net and progressive distillation to the table and the report, and the
refinement that goes beyond the paper, also in a workdir where the first command has finished.
Measured on two CPU cores: 25 min 27 s, installation included; README.md has the table. `:full` without
refinement: 67 min 33 s.
"""

from ml_collections import ConfigDict

from configs import common, distill, evaluate, export, progressive, refine, reflow


def get_config(variant: str = "openmoji") -> ConfigDict:
    change = common.pick({"openmoji": None, "full": full}, variant)
    config = openmoji()
    if change:
        change(config)
    return config.lock()


def openmoji() -> ConfigDict:
    config = ConfigDict()
    config.stage = "demo"
    config.check = False  # true only makes every check that needs no long computation
    config.reflow = reflow.get_config()
    config.generate = config.reflow.pairs  # the same object
    config.distill = distill.get_config()
    config.direct = distill.get_config("direct")
    with config.distill.unlocked(), config.direct.unlocked():  # what they chain is what runs before them
        config.distill.reflow = config.direct.reflow = config.reflow
        config.direct.pairs = config.generate
    config.evaluate = evaluate.get_config()
    config.export = export.get_config()
    config.export.replace = True
    # Expected time of each stage on two CPU cores; the progress lines add them up.
    config.minutes = {"generate": 3.3, "reflow": 6.4, "distill": 5.7, "direct": 3.5, "evaluate": 5.2, "export": 0.1}
    return config


def full(config: ConfigDict) -> None:
    """Adds what else the paper trains or compares, and refinement, each with its own recipe."""
    config.reflow_3 = reflow.get_config()
    config.lpips = distill.get_config("lpips")  # starts from what `config.distill` trained
    config.refine = refine.get_config()
    config.stacked = distill.get_config("stacked")
    config.progressive = progressive.get_config()
    config.reflow_3.k, config.reflow_3.pairs = 3, config.generate
    config.reflow_3.later.pairs = config.lpips.pairs = config.stacked.pairs = config.distill.pairs
    with config.refine.unlocked():
        config.refine.reflow = config.reflow
    config.lpips.reflow = config.stacked.reflow = config.reflow
    config.progressive.pairs, config.progressive.alpha = config.generate, config.generate.get_ref("alpha")
    config.minutes.update({"reflow_3": 6.5, "lpips": 4.5, "refine": 11, "stacked": 9, "progressive": 18, "evaluate": 9})
