"""Stage `export`: a trained flow → formats that run without this package, and a model card."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from instaflow_jax import sampling
from instaflow_jax.infra import devices, stores
from instaflow_jax.infra.checkpoint import has_checkpoints
from instaflow_jax.infra.files import (
    atomic_directory,
    find_damage,
    format_bytes,
    read_json,
    write_checksums,
    write_json,
    write_text,
)
from instaflow_jax.infra.stores import CHECKPOINTS
from instaflow_jax.models.stacked_unet import StackedUNet
from instaflow_jax.stages import distill
from instaflow_jax.stages.common.loading import EXPORT, WeightOptions, read_prompts, read_weight_options
from instaflow_jax.stages.common.ranges import check_ranges
from instaflow_jax.stages.export import card as export_card
from instaflow_jax.stages.export import licence as export_licence
from instaflow_jax.stages.export import onnx, single_file, web
from instaflow_jax.stages.export import source as export_source
from instaflow_jax.stages.export.formats import CONVENTIONS, PROGRAMS, WRITERS, Options
from instaflow_jax.stages.export.source import MANIFEST, Source
from instaflow_jax.weights import hub, ldm


def run(config: ConfigDict, workdir: str) -> None:
    """Writes `config.model` to `workdir`/`config.output`: a folder for each format, README.md and export.json.

    The directory appears under its name only when it is complete; a directory that it replaces stays until then. Then
    it is uploaded to `config.push`, if that names a repository. An export that is there already is only uploaded.

    Raises:
      ValueError, FileNotFoundError: a field of the config, or a file of the model, is wrong.
      FileExistsError: the directory exists.
      OSError: the upload failed; the export stays.
    """
    options, weight_options = read_fields(config)
    made = is_made(config, options, workdir)
    devices.barrier("export begins")
    if not made:
        make(config, workdir, options, weight_options)
    if config.push and jax.process_index() == 0:
        stores.sync()  # a refused upload must not keep the export from the bucket that the workdir may be in
        push(Path(workdir) / config.output, config.push, dry_run=config.push_dry_run)
    devices.barrier("exported")


def make(config: ConfigDict, workdir: str, options: Options, weight_options: WeightOptions) -> None:
    """Loads the model, which is distilled first if it does not exist, and writes the directory."""
    target = Path(workdir) / config.output
    model = config.model or need_distill(config.distill, workdir)
    source = export_source.load(model, config.weights, config.dynamics, weight_options)
    check_formats(options, source)
    if jax.process_index() == 0:
        stores.replace(target)
        with atomic_directory(target) as directory:
            write(source, directory, options, Path(workdir))
        print(f"wrote {target}: {', '.join(options.formats)}, README.md", flush=True)


def write(source: Source, directory: Path, options: Options, workdir: Path) -> None:
    """Every format into its folder, then export.json and the card."""
    licence = export_licence.licence(source)
    options = dataclasses.replace(options, licence=licence.name)
    for name in options.formats:
        print(f"writing {name}", flush=True)
        WRITERS[name](source, directory / name, options)
        if name != "orbax":  # the checksums of the complete export cover it; Orbax reads its folder alone
            write_checksums(directory / name)
    facts = {"model": source.name, "step": source.step, "weights": source.weights}
    facts |= settings(options) | {"licence": licence.name, "run": source.run}
    write_json(directory / MANIFEST, facts, indent=2)
    write_text(directory / "README.md", export_card.card(source, licence, options, workdir))
    write_checksums(directory)


def settings(options: Options) -> dict[str, Any]:
    """What an export's manifest records of the options."""
    fields = ("convention", "single_file_dtype")
    return {"formats": list(options.formats)} | {name: getattr(options, name) for name in fields}


def is_made(config: ConfigDict, options: Options, workdir: str) -> bool:
    """Whether the export that `config` asks to upload is there, complete.

    Raises:
      FileExistsError: another directory is in its place, see `check_target`.
      ValueError: a file of it is damaged.
    """
    target = Path(workdir) / config.output
    if config.push and not config.replace and (target / MANIFEST).is_file():
        damage = find_damage(stores.local(target))
        if damage:
            raise ValueError(f"{damage}; use --config.replace=true to make the export again")
        found, asked = read_json(target / MANIFEST), settings(options) | {"weights": config.weights}
        same_model = not config.model or Path(found["model"]) == Path(stores.address(config.model))
        if same_model and all(found.get(name) == value for name, value in asked.items()):
            return True
    check_target(target, config.replace)
    return False


def push(target: Path, repository: str, *, dry_run: bool) -> None:
    """Uploads an export, or only prints what would be sent. Raises OSError if the upload failed."""
    sizes = {path.relative_to(target): path.stat().st_size for path in sorted(target.rglob("*")) if path.is_file()}
    what = f"{target} to {repository}: {len(sizes)} files, {format_bytes(sum(sizes.values()))}"
    if dry_run:
        files = "\n".join(f"  {path.as_posix()}  {format_bytes(size)}" for path, size in sizes.items())
        front = (target / "README.md").read_text(encoding="utf-8").split("---\n")[1]
        print(f"would upload {what}\n{files}\nwith the card's fields\n{front}", end="", flush=True)
        return
    print(f"uploading {what}", flush=True)
    try:
        print(f"uploaded: {hub.upload(target, repository)}", flush=True)
    except OSError as error:
        raise OSError(f"{error}; {target} is complete, and the same command only uploads it again") from error


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
    options, weight_options = read_fields(config)
    if is_made(config, options, workdir):
        return
    if not config.model and not is_distilled(Path(workdir) / config.distill.output):
        distill.check(config.distill, workdir)
        return
    model = config.model or need_distill(config.distill, workdir)
    check_formats(options, export_source.load(model, config.weights, config.dynamics, weight_options))


def check_fields(config: ConfigDict, workdir: str) -> None:
    """Every check that needs no model. Raises as `run` does."""
    is_made(config, read_fields(config)[0], workdir)


def read_fields(config: ConfigDict) -> tuple[Options, WeightOptions]:
    """The config as values, after every check that needs no file. Raises as `run` does."""
    check_ranges(config)
    options, weight_options = read_options(config), read_weight_options(config)
    if config.push:
        hub.check_upload(config.push, with_token=not config.push_dry_run)
    return options, weight_options


def read_options(config: ConfigDict) -> Options:
    """What to write, after the checks that need no files.

    Raises:
      ValueError: naming field, value and rule.
      ModuleNotFoundError: a format needs jax2onnx, which is not installed.
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
    if {"onnx", "web"} & set(config.formats):
        onnx.check_converter()
    fields = ("convention", "prompts", "dtype", "onnxruntime_web", "single_file_dtype")
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
    """Checks that the model can be written in each format.

    Raises:
      ValueError: a one-step program is requested of a teacher, a Stacked U-Net for formats that have none, a page
        without its runtime or of a model that is too large, or adapters of a run that trained none or of a base that no
        other program has.
    """
    programs = [name for name in options.formats if name in PROGRAMS]
    if programs and not isinstance(source.dynamics, sampling.Flow):
        raise ValueError(
            f"{source.name} is a teacher, but the format {programs[0]!r} is the one-step program of a flow: leave it "
            "out of config.formats, or set config.dynamics='flow' if the model is a flow and its files do not say so"
        )
    if "msgpack" in options.formats and source.pipe.nets["unet"].module is StackedUNet:
        raise ValueError(
            f"{source.name} is a Stacked U-Net, and diffusers' Flax classes, for which 'msgpack' is, have none: "
            "leave it out of config.formats, as configs/export.py:stacked does"
        )
    if "single_file" in options.formats:
        single_file.check(source, options.single_file_dtype)
    if "web" in options.formats:
        web.check(source, options.onnxruntime_web)
    if "lora" in options.formats and not source.adapters:
        raise ValueError(
            f"{source.name} is not a run that trained adapters (config.lora), which the format 'lora' holds: leave it "
            "out of config.formats, or name such a run's folder in config.model"
        )
    if "lora" in options.formats and source.adapters.is_converted:
        raise ValueError(
            f"{source.name} trained its adapters beside weights that it had made from {source.adapters.base} itself (a "
            "warm start or a Stacked U-Net), so no other program has their base: leave 'lora' out of config.formats, "
            "the other formats hold the merged model"
        )
