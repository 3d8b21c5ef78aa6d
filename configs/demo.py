"""The whole method on the embedded world, from the teacher's pairs to a report that explains itself.

    launch/demo.sh                                                       # installs, then this:
    python -m instaflow_jax.main --config=configs/demo.py --workdir=DIR --cpu_devices=2

Pairs → reflow → distillation → distillation without reflow, the paper's baseline → evaluation → export → DIR/report.html.
It may be killed at any moment: started again it goes on, and what is finished is not made again. Every stage's own config
is in here: `--config.reflow.loop.steps=2000`, `--config.generate.count=8192`.
Measured on two CPU cores: 25 min 27 s, installation included; README.md has the table.
"""

from ml_collections import ConfigDict

from configs import distill, evaluate, export, reflow


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.stage = "demo"
    config.reflow = reflow.get_config()
    config.generate = config.reflow.pairs  # the same object
    config.distill = distill.get_config()
    config.direct = distill.get_config("direct")
    config.evaluate = evaluate.get_config()
    config.export = export.get_config()
    config.export.replace = True
    # What the first line promises, on two CPU cores; about what each stage took there.
    config.minutes = {"generate": 3.3, "reflow": 6.4, "distill": 5.7, "direct": 3.5, "evaluate": 5.2, "export": 0.1}
    return config.lock()
