"""Stage `demo`: every stage of the method, one after the other, and a report at the end."""

import contextlib
import json
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from instaflow_jax import __version__
from instaflow_jax.data.openmoji import drawing
from instaflow_jax.infra.files import read_json, write_json
from instaflow_jax.infra.progress import clock_time
from instaflow_jax.stages import distill, progressive, refine, reflow
from instaflow_jax.stages.common import fit
from instaflow_jax.stages.common.loading import EXPORT, has_export
from instaflow_jax.stages.common.machine import machine
from instaflow_jax.stages.common.ranges import check_ranges
from instaflow_jax.stages.demo import report
from instaflow_jax.stages.demo.report import LEDGER
from instaflow_jax.stages.evaluate import stage as evaluate
from instaflow_jax.stages.export import stage as export
from instaflow_jax.stages.generate import stage as generate


class Step(NamedTuple):
    """One stage: its field of the config, what it does, and the file that exists once it has finished.

    Later steps depend on what a step with `trains` makes, so its settings must not change within a workdir.
    """

    name: str
    does: str
    run: Callable[[ConfigDict, str], None]
    product: str
    trains: bool


def start_from_distilled(config: ConfigDict, workdir: str) -> ConfigDict:
    """A copy of the LPIPS phase's config that starts from the L2 phase's model; from the flow if that is missing."""
    config, source = config.copy_and_resolve_references().unlock(), Path(workdir) / "distill"
    config.init_from = str(source / EXPORT) if has_export(source) else ""
    return config.lock()


def run_lpips(config: ConfigDict, workdir: str) -> None:
    distill.run(start_from_distilled(config, workdir), workdir)


def check_lpips(config: ConfigDict, workdir: str) -> None:
    distill.check(start_from_distilled(config, workdir), workdir)


STEPS = (  # those that have no field in the config are left out
    Step("generate", "pairs of noise and image, from the teacher", generate.run, "pairs/dataset_info.json", True),
    Step("reflow", "reflow: straight paths between them (2-RF)", reflow.run, "reflow/export/model_index.json", True),
    Step("distill", "distillation of 2-RF into one step", distill.run, "distill/export/model_index.json", True),
    Step("direct", "distillation without reflow, for comparison", distill.run, "direct/export/model_index.json", True),
    Step("reflow_3", "reflow of 2-RF's own pairs (3-RF)", reflow.run, "reflow_3/export/model_index.json", True),
    Step("lpips", "distillation continued by LPIPS", run_lpips, "distill_lpips/export/model_index.json", True),
    Step("refine", "refinement of 2-RF, beyond the paper", refine.run, "refine/export/model_index.json", True),
    Step("stacked", "distillation of 2-RF into a Stacked U-Net", distill.run, "stacked/export/model_index.json", True),
    Step(
        *("progressive", "progressive distillation, for comparison", progressive.run),
        *("progressive_1/export/model_index.json", True),
    ),
    Step("evaluate", "evaluation of all models", evaluate.run, "evaluate/results.json", False),
    Step("export", "export of the one-step model", export.run, "export/export.json", False),
)
CHECKS: dict[str, Callable[[ConfigDict, str], Any]] = {  # before the first step, when no model may exist yet
    "distill": distill.check,  # and of the steps before it
    "direct": distill.check,
    "reflow_3": reflow.check,
    "lpips": check_lpips,
    "refine": refine.check,
    "stacked": distill.check,
    "progressive": progressive.check,
    "evaluate": evaluate.check_fields,
    "export": export.check_fields,
}


def run(config: ConfigDict, workdir: str) -> None:
    """Runs every stage in `workdir` and writes `workdir`/report.html; reuses what an earlier run finished.

    Raises:
      ValueError: the workdir was made with other settings, or a model that later steps depend on was deleted.
      Other errors: see the stages.
    """
    check(config, workdir)
    with quiet_drawing_warnings():
        run_all({step.name: config[step.name] for step in steps(config)}, dict(config.minutes), Path(workdir))


def check(config: ConfigDict, workdir: str) -> None:
    """The checks of every stage that is left to run. Raises as `run` does; nothing is written."""
    if jax.process_count() > 1:
        raise ValueError("the demo runs in one process, on all its devices; run without --processes")
    check_ranges(config)
    settings = {step.name: json.loads(config[step.name].to_json_best_effort()) for step in steps(config)}
    for step in unfinished(Path(workdir), open_ledger(Path(workdir), settings), settings):
        if step.name in CHECKS:
            CHECKS[step.name](config[step.name], workdir)


def steps(settings: Collection[str]) -> list[Step]:
    """Those of `STEPS` that `settings` has a field for."""
    return [step for step in STEPS if step.name in settings]


def run_all(configs: Mapping[str, ConfigDict], minutes: Mapping[str, float], directory: Path) -> None:
    """Runs the unfinished steps and writes the report; `minutes` are the expected times on two CPU cores."""
    settings = {name: json.loads(config.to_json_best_effort()) for name, config in configs.items()}
    ledger = open_ledger(directory, settings)
    left = unfinished(directory, ledger, settings)
    began, total = time.monotonic(), len(configs) + 1
    plan = "everything is finished"
    if left:
        expected = round(sum(minutes[step.name] for step in left)) or 1
        plan = f"about {expected} minutes on two CPU cores; stop at any time, the same command continues"
    print(f"{directory}: {plan}", flush=True)
    for number, step in enumerate(steps(configs), 1):
        head = f"[{number}/{total}] {step.does}"
        if step not in left:
            print(f"{head}: finished before, in {clock_time(ledger['steps'][step.name]['seconds'])}", flush=True)
            continue
        expected = round(sum(minutes[other.name] for other in left[left.index(step) :])) or 1
        print(f"\n{head}  ({clock_time(time.monotonic() - began)} passed, about {expected} min left)", flush=True)
        run_step(step, configs[step.name], directory, ledger, settings[step.name])
    page, passed = report.write(directory).absolute(), clock_time(time.monotonic() - began)
    print(f"\n[{total}/{total}] report, after {passed}: open it in a browser\n{page}", flush=True)


@contextlib.contextmanager
def quiet_drawing_warnings() -> Iterator[None]:
    """Silences the warning that lists emoji without an SVG."""
    logger = logging.getLogger(drawing.__name__)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def run_step(step: Step, config: ConfigDict, directory: Path, ledger: dict[str, Any], settings: dict[str, Any]) -> None:
    """Runs one step and records its time; a step without a time was interrupted, and counts as run again."""
    directory.mkdir(parents=True, exist_ok=True)
    entry = ledger["steps"].setdefault(step.name, {"runs": 0})
    entry |= {"runs": entry["runs"] + 1 if "seconds" not in entry else 1, "settings": settings}
    entry.pop("seconds", None)
    write_json(directory / LEDGER, ledger)
    began = time.monotonic()
    step.run(config, str(directory))
    entry["seconds"] = round(time.monotonic() - began, 1)
    write_json(directory / LEDGER, ledger)


def open_ledger(directory: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The record of earlier runs in this workdir.

    Raises:
      ValueError: the workdir was made with other training settings, or by another version of this package.
    """
    path = directory / LEDGER
    new = {"version": __version__, "machine": machine(), "steps": {}}
    ledger = read_json(path) if path.is_file() else new
    version = ledger.get("version", "0.1")  # which recorded none
    for step in steps(settings):
        now = settings[step.name]
        before = ledger["steps"].get(step.name, {"settings": now})["settings"]
        fields = [f"{step.name}.{field}" for field in fit.differing(fit.saved(before), fit.flat(now))]
        if not step.trains or (not fields and (version == __version__ or before == now)):
            continue
        why = f"was made with another {', '.join(fields)}"
        if version != __version__:
            why = f"was made by another version of instaflow_jax ({version}, not {__version__})"
        raise ValueError(f"{directory} {why}: use another --workdir, or delete this one")
    return ledger


def unfinished(directory: Path, ledger: dict[str, Any], settings: dict[str, Any]) -> list[Step]:
    """The steps to run: the first unfinished one, and all after it.

    Raises:
      ValueError: a model is missing, but a model that was trained from it exists.
    """
    wanted = steps(settings)
    done = [is_done(step, directory, ledger, settings) for step in wanted]
    if all(done):
        return []
    first = done.index(False)
    for step, finished in zip(wanted[first:], done[first:], strict=True):
        if step.trains and finished:
            raise ValueError(
                f"{directory / wanted[first].product} is missing, but {directory / step.product}, which was made "
                "after it, exists: use another --workdir, or delete this one"
            )
    return wanted[first:]


def is_done(step: Step, directory: Path, ledger: dict[str, Any], settings: dict[str, Any]) -> bool:
    """Whether a step finished with these settings and its product still exists."""
    entry = ledger["steps"].get(step.name, {})
    finished = "seconds" in entry and not fit.differing(fit.saved(entry["settings"]), fit.flat(settings[step.name]))
    return finished and (directory / step.product).is_file()
