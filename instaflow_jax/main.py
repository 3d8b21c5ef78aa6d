"""`python -m instaflow_jax.main --config=configs/STAGE.py[:variant] [--config.field=value …] [--workdir=DIR]`

Reads the config, joins the other hosts if there are any, and runs the stage that the config names. A mistake in the
config or in a file ends in one line on stderr and exit code 1 (--verbosity=1 shows where it was raised); a bug shows its
traceback. Several processes make one run with --coordinator, --processes and --process; on Slurm or a TPU pod
--processes=0 is enough. On a CPU, --cpu_devices=2 gives each of two cores its own share of a batch.
"""

import importlib
import logging
import sys

from instaflow_jax.infra import huge_pages

if __name__ == "__main__":
    huge_pages.ask()  # before all that takes a second to import

import jax
import ml_collections
from absl import app, flags
from ml_collections import config_flags

from instaflow_jax.infra import devices

STAGES = {  # name of a stage → its module in instaflow_jax.stages
    **{name: name for name in ("sample", "reflow", "distill")},
    **{
        name: f"{name}.stage"
        for name in ("pretrain", "generate", "evaluate", "evaluate_coco", "export", "serve", "demo")
    },
}

_CONFIG = config_flags.DEFINE_config_file("config", None, "configs/STAGE.py, or configs/STAGE.py:variant")
_COORDINATOR = flags.DEFINE_string("coordinator", "", "host:port of process 0; '' where the cluster tells it")
_PROCESSES = flags.DEFINE_integer("processes", 1, "processes of this run; 0 where the cluster tells it")
_PROCESS = flags.DEFINE_integer("process", -1, "this one, from 0; -1 where the cluster tells it")
_CPU_DEVICES = flags.DEFINE_integer(
    "cpu_devices", 0, "devices the CPU is split into, e.g. its cores; 0 leaves it whole", lower_bound=0
)
_WORKDIR = flags.DEFINE_string("workdir", "runs", "where the stage writes")


def run(config: ml_collections.ConfigDict, workdir: str) -> None:
    """Runs the stage `config.stage` with all it makes under `workdir`.

    Raises:
      ValueError: there is no such stage, or a field of the config is wrong.
      FileNotFoundError: an input is missing.
    """
    if config.stage not in STAGES:
        raise ValueError(f"config.stage={config.stage!r} is not one of {', '.join(STAGES)}")
    importlib.import_module(f"instaflow_jax.stages.{STAGES[config.stage]}").run(config, workdir)


def main(argv: list[str]) -> None:
    """Entry point for absl."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; options are written --config.field=value")
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)  # which platforms it did not find
    logging.getLogger("absl").addFilter(_worth_telling)
    if _CPU_DEVICES.value:
        jax.config.update("jax_num_cpu_devices", _CPU_DEVICES.value)
    try:
        devices.initialize(coordinator=_COORDINATOR.value, processes=_PROCESSES.value, process=_PROCESS.value)
        run(_CONFIG.value, _WORKDIR.value)
    except (ValueError, OSError, FloatingPointError) as error:
        if flags.FLAGS["v"].value > 0:  # absl's --verbosity=1 shows where it was raised
            raise
        sys.exit(f"error: {error}")


def _worth_telling(record: logging.LogRecord) -> bool:
    """Of TFDS' log the warnings alone: which file it reads is no news."""
    return "tensorflow_datasets" not in record.pathname or record.levelno >= logging.WARNING


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main)
