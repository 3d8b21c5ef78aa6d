"""What a stage's program takes on a machine that is not there: memory, time and money, from the real compilers.

    python -m instaflow_jax.main --config=configs/plan.py:reflow_sd15 --config.target=v5e-8 --config.program.fsdp=8
    python -m instaflow_jax.main --config=configs/plan.py:distill_sd15_lpips --config.target=h100-8 \\
        --config.dollars_per_device_hour=2.5
    python -m instaflow_jax.main --config=configs/plan.py:sample_instaflow --config.target=v6e-1
    python -m instaflow_jax.main --config=configs/plan.py:generate_sd15 --config.target=h100-8

The variant is STAGE_VARIANT, a stage and a variant of its config: sample, generate, reflow, distill, refine or
progressive (its first round). The stage's own fields are `config.program`, e.g. --config.program.batch_size=128.
Compiles the program that the stage would run, from shapes alone; writes DIR/plan/NAME.json and NAME.md. Needs a
compiler: pip install -e '.[plan-tpu]' for TPUs, '.[gpu]' for NVIDIA's cards. At SD 1.5's size that takes one to ten
minutes and 6 GB of memory on two cores.
"""

import importlib

from ml_collections import ConfigDict

STAGES = ("sample", "generate", "reflow", "distill", "refine", "progressive")
LARGE = ("sd15", "sd21", "rf2", "instaflow")  # beginnings of the variants' names that are of SD's size


def get_config(variant: str = "reflow_openmoji") -> ConfigDict:
    stage, _, name = variant.partition("_")
    if stage not in STAGES or not name:
        raise ValueError(f"this config has no variant {variant!r}; use STAGE_VARIANT, a stage of {', '.join(STAGES)}")
    config = ConfigDict()
    config.stage = "plan"
    config.program = importlib.import_module(f"configs.{stage}").get_config(name)
    # Networks: sd15, sd15_stacked (InstaFlow-1.7B's), an embedded model, or a directory in diffusers layout, of which
    # only the config.json are read.
    config.shapes = "sd15" if name.startswith(LARGE) else "openmoji"
    config.target = "v5e-4"  # FAMILY-CHIPS: v4, v5e, v5p, v6e, tpu7x; or CARD-COUNT: a100, h100, h200
    # Of the TPU's compiler: O0 to O3, or UNKNOWN, which training uses. O0 compiles faster and plans about as much
    # memory; only there is memory traffic counted.
    config.optimization_level = "O0"
    config.search = False  # try micro-batches, remat, FSDP and attention, and print the fastest plan that fits
    config.dollars_per_device_hour = 0.0
    config.check = False  # true only makes every check that needs no long computation
    return config.lock()
