"""Stage `export`: a trained flow → formats that run without this package, and a model card."""

import dataclasses
from pathlib import Path

import jax
from ml_collections import ConfigDict

from instaflow_jax import sampling
from instaflow_jax.infra import devices, stores
from instaflow_jax.infra.checkpoint import has_checkpoints
from instaflow_jax.infra.files import atomic_directory, write_checksums, write_json, write_text
from instaflow_jax.infra.stores import CHECKPOINTS
from instaflow_jax.models.stacked_unet import StackedUNet
from instaflow_jax.stages import distill
from instaflow_jax.stages.common.loading import EXPORT, WeightOptions, read_prompts, read_weight_options
from instaflow_jax.stages.common.ranges import check_ranges
from instaflow_jax.stages.export import card as export_card
from instaflow_jax.stages.export import single_file
from instaflow_jax.stages.export import source as export_source
from instaflow_jax.stages.export.formats import CONVENTIONS, WRITERS, Options
from instaflow_jax.stages.export.source import MANIFEST, Source
from instaflow_jax.weights import ldm


def run(config: ConfigDict, workdir: str) -> None:
    """Writes `config.model` to `workdir`/`config.output`: a folder for each format, README.md and export.json.

    The directory appears under its name only when it is complete; a directory that it replaces stays until then.

    Raises:
      ValueError, FileNotFoundError: a field of the config, or a file of the model, is wrong.
      FileExistsError: the directory exists.
    """
    options, weight_options = check_fields(config, workdir)
    target = Path(workdir) / config.output
    devices.barrier("export begins")
    model = config.model or need_distill(config.distill, workdir)
    source = export_source.load(model, config.weights, config.dynamics, weight_options)
    check_formats(options, source)
    if jax.process_index() == 0:
        stores.replace(target)
        with atomic_directory(target) as directory:
            write(source, directory, options, Path(workdir))
        print(f"wrote {target}: {', '.join(options.formats)}, README.md", flush=True)
    devices.barrier("exported")


def write(source: Source, directory: Path, options: Options, workdir: Path) -> None:
    """Every format into its folder, then export.json and the card."""
    licence = export_card.licence(source)
    options = dataclasses.replace(options, licence=licence.name)
    for name in options.formats:
        print(f"writing {name}", flush=True)
        WRITERS[name](source, directory / name, options)
        if name != "orbax":  # the checksums of the complete export cover it; Orbax reads its folder alone
            write_checksums(directory / name)
    facts = {"model": source.name, "step": source.step, "weights": source.weights, "formats": list(options.formats)}
    facts |= {"convention": options.convention, "licence": licence.name, "run": source.run}
    write_json(directory / MANIFEST, facts, indent=2)
    write_text(directory / "README.md", export_card.card(source, licence, options, workdir))
    write_checksums(directory)


def is_distilled(run: Path) -> bool:
    """Whether a distillation has left anything in `run`."""
    return has_checkpoints(run / CHECKPOINTS) or (run / EXPORT / "model_index.json").is_file()


def need_distill(config: ConfigDict, workdir: str) -> str:
    """The run in `workdir` that the distillation `config` makes; it is trained first if it does not exist."""
    run = Path(workdir) / config.output
    if not is_distilled(run):
        print(f"{run} is missing\n→ running distill first", flush=True)
        distill.run(config, workdir)
    return str(run if has_checkpoints(run / CHECKPOINTS) else run / EXPORT)


# ---------------------------------------------------------------- checks, before anything is written


def check(config: ConfigDict, workdir: str) -> None:
    """Every check of `run` and of the distillation that it would run first, without writing. Raises as `run` does."""
    options, weight_options = check_fields(config, workdir)
    if not config.model and not is_distilled(Path(workdir) / config.distill.output):
        return distill.check(config.distill, workdir)
    model = config.model or need_distill(config.distill, workdir)
    check_formats(options, export_source.load(model, config.weights, config.dynamics, weight_options))


def check_fields(config: ConfigDict, workdir: str) -> tuple[Options, WeightOptions]:
    """The config as values, after every check that needs no model. Raises as `run` does."""
    check_ranges(config)
    options, weight_options = read_options(config), read_weight_options(config)
    check_target(Path(workdir) / config.output, config.replace)
    return options, weight_options


def read_options(config: ConfigDict) -> Options:
    """What to write, after the checks that need no files.

    Raises:
      ValueError: naming field, value and rule.
    """
    known = {"weights": export_source.WEIGHTS, "convention": CONVENTIONS, "dynamics": sampling.DYNAMICS}
    known["single_file_dtype"] = tuple(ldm.DTYPES)
    for field, allowed in known.items():
        if config[field] not in allowed:
            raise ValueError(f"config.{field}={config[field]!r} is not one of {', '.join(allowed)}")
    unknown = [name for name in config.formats if name not in WRITERS]
    if unknown or not config.formats or isinstance(config.formats, str):
        raise ValueError(
            f"config.formats={config.formats!r} must name some of {', '.join(WRITERS)}, "
            "written --config.formats=\"('orbax','diffusers')\""
        )
    if config.attention != "xla":
        raise ValueError(
            f"config.attention={config.attention!r}: the exported program runs on every platform, and only 'xla' does; "
            "use config.attention='xla'"
        )
    read_prompts(config.prompts)
    fields = ("convention", "prompts", "dtype", "single_file_dtype")
    return Options(tuple(config.formats), **{name: config[name] for name in fields})


def check_target(target: Path, replace: bool) -> None:
    """FileExistsError if `target` exists and is not an export, or `replace` is not set."""
    if not target.exists():
        return
    if not (target / MANIFEST).is_file():
        raise FileExistsError(f"{target} exists and is not an export of this stage: choose another config.output")
    if not replace:
        raise FileExistsError(
            f"{target} exists: use --config.replace=true to replace it, or choose another config.output"
        )


def check_formats(options: Options, source: Source) -> None:
    """ValueError if a format cannot hold the model, such as a one-step program a teacher."""
    formats = options.formats
    if "stablehlo" in formats and not isinstance(source.dynamics, sampling.Flow):
        raise ValueError(
            f"{source.name} is a teacher, but the format 'stablehlo' is the one-step program of a flow: leave it out "
            "of config.formats, or set config.dynamics='flow' if the model is a flow and its files do not say so"
        )
    if "msgpack" in formats and source.pipe.nets["unet"].module is StackedUNet:
        raise ValueError(
            f"{source.name} is a Stacked U-Net, and diffusers' Flax classes, for which 'msgpack' is, have none: "
            "leave it out of config.formats, as configs/export.py:stacked does"
        )
    if "single_file" in formats:
        single_file.check(source, options.single_file_dtype)
