"""Stage `export`: a trained flow → forms that others run without this package, and a card that says what it is."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
from ml_collections import ConfigDict

from instaflow_jax import sampling
from instaflow_jax.infra import devices
from instaflow_jax.stages.common.loading import read_prompts, read_weight_options
from instaflow_jax.stages.export import card as export_card
from instaflow_jax.stages.export import formats as export_formats
from instaflow_jax.stages.export import source as export_source
from instaflow_jax.stages.export.source import MANIFEST


def run(config: ConfigDict, workdir: str) -> None:
    """Writes `config.model` to `workdir`/`config.output`: a folder for each of `config.formats`, README.md, export.json.

    The directory appears when all of it is written; until then one that it replaces stays.

    Raises:
      ValueError, FileNotFoundError: a field of the config, or a file of the model, is wrong.
      FileExistsError: the directory is there.
    """
    check(config)
    target = Path(workdir) / config.output
    check_target(target, config.replace)
    devices.barrier("export begins")
    source = export_source.load(config, workdir)
    check_formats(config, source)
    if jax.process_index() == 0:
        with whole_directory(target) as directory:
            write(config, source, directory, workdir)
        print(f"wrote {target}: {', '.join(config.formats)}, README.md", flush=True)
    devices.barrier("exported")


def write(config: ConfigDict, source: export_source.Source, directory: Path, workdir: str) -> None:
    """Every format into its folder, then the card."""
    for form in config.formats:
        print(f"writing {form}", flush=True)
        export_formats.WRITERS[form](source, directory / form, config)
    licence = export_card.licence(source)
    facts = {
        "model": source.name,
        "step": source.step,
        "weights": config.weights,
        "formats": list(config.formats),
        "convention": config.convention,
        "licence": licence.name,
        "run": source.run,
    }
    (directory / MANIFEST).write_text(json.dumps(facts, indent=2) + "\n")
    (directory / "README.md").write_text(export_card.card(config, source, licence, Path(workdir)), encoding="utf-8")


# ---------------------------------------------------------------- refusals, before anything is written


def check(config: ConfigDict) -> None:
    """Cross-field checks, before anything is loaded.

    Raises:
      ValueError: naming field, value and rule.
    """
    read_weight_options(config)
    known = {"weights": export_source.WEIGHTS, "convention": export_formats.CONVENTIONS, "kind": sampling.DYNAMICS}
    for field, allowed in known.items():
        if config[field] not in allowed:
            raise ValueError(f"config.{field}={config[field]!r} is not one of {', '.join(allowed)}")
    unknown = [form for form in config.formats if form not in export_formats.WRITERS]
    if unknown or not config.formats or isinstance(config.formats, str):
        raise ValueError(
            f"config.formats={config.formats!r} must name some of {', '.join(export_formats.WRITERS)}, "
            "written --config.formats=\"('orbax','diffusers')\""
        )
    if config.attention != "xla":
        raise ValueError(
            f"config.attention={config.attention!r}: the program is for every platform, which has only 'xla'"
        )
    read_prompts(config.prompts)


def check_target(target: Path, replace: bool) -> None:
    """FileExistsError where `target` is there and may not be replaced: not asked to, or not an export."""
    if not target.exists():
        return
    if not (target / MANIFEST).is_file():
        raise FileExistsError(f"{target} is there and is no export of this stage: choose another config.output")
    if not replace:
        raise FileExistsError(
            f"{target} is there: --config.replace=true puts the new export in its place, config.output chooses another"
        )


def check_formats(config: ConfigDict, source: export_source.Source) -> None:
    """ValueError for a program of one step asked from a teacher, which needs many."""
    if "stablehlo" in config.formats and not isinstance(source.dynamics, sampling.Flow):
        raise ValueError(
            f"{source.name} is a teacher, and the format 'stablehlo' is the program of one step of a flow: "
            "leave it out of config.formats (config.dynamics='flow' if the directory does not say what it is)"
        )


@contextlib.contextmanager
def whole_directory(target: Path) -> Iterator[Path]:
    """A temporary directory that becomes `target` when the block ends well, and vanishes when it does not.

    A `target` that was there gives way only then; both are whole on disk at any moment of the exchange.
    """
    temporary, old = (target.with_name(target.name + ending) for ending in (".tmp", ".old"))
    if old.exists() and not target.exists():  # killed in the middle of the exchange
        old.rename(target)
    for left in (temporary, old):
        shutil.rmtree(left, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if target.exists():
            target.rename(old)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
