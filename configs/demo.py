"""The complete method on the embedded world, from the teacher's pairs to a report.

    launch/demo.sh                                                       # installs, then runs this:
    python -m instaflow_jax.main --config=configs/demo.py --workdir=DIR --cpu_devices=2

Pairs → reflow → distillation → distillation without reflow (the paper's baseline) → evaluation → export →
DIR/report.html. It may be killed at any moment; started again it continues and reuses what has finished. The config of
every stage is part of this one: `--config.reflow.loop.steps=2000`, `--config.generate.count=8192`.
Measured on two CPU cores: 25 min 27 s, installation included; README.md has the table.
"""

from ml_collections import ConfigDict

from configs import distill, evaluate, export, reflow


def get_config() -> ConfigDict:
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
    return config.lock()
