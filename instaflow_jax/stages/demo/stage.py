"""Stage `demo`: every stage of the method, one after the other, and a report at the end."""

import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from instaflow_jax.data.openmoji import drawing
from instaflow_jax.infra.files import read_json, write_json
from instaflow_jax.infra.progress import clock_time
from instaflow_jax.stages import distill, reflow
from instaflow_jax.stages.demo import report
from instaflow_jax.stages.evaluate import stage as evaluate
from instaflow_jax.stages.evaluate.measures import machine
from instaflow_jax.stages.export import stage as export
from instaflow_jax.stages.generate import stage as generate

LEDGER = "demo.json"  # which settings the workdir was made with, and how long each step took


class Step(NamedTuple):
    """One stage: its field of the config, what it does, and the file that is there when it is done.

    A step with `trains` makes what later ones are made from, so its settings are not to change within a workdir.
    """

    name: str
    does: str
    run: Callable[[ConfigDict, str], None]
    product: str
    trains: bool


STEPS = (
    Step("generate", "pairs of noise and picture, by the teacher", generate.run, "pairs/dataset_info.json", True),
    Step("reflow", "reflow: straight paths between them (2-RF)", reflow.run, "reflow/export/model_index.json", True),
    Step("distill", "distillation of 2-RF into one step", distill.run, "distill/export/model_index.json", True),
    Step("direct", "distillation without reflow, for comparison", distill.run, "direct/export/model_index.json", True),
    Step("evaluate", "evaluation of all of them", evaluate.run, "evaluate/results.json", False),
    Step("export", "the one-step model for other programs", export.run, "export/export.json", False),
)


def run(config: ConfigDict, workdir: str) -> None:
    """Fills `workdir` and writes `workdir`/report.html; what an earlier run has finished is reused.

    Raises:
      ValueError: the workdir was made with other settings, or what later steps were made from is no longer there.
      And whatever the stages raise.
    """
    if jax.process_count() > 1:
        raise ValueError("the demo runs in one process, on all its devices: leave --processes away")
    with undrawable_untold():
        take_all(config, Path(workdir))


def take_all(config: ConfigDict, directory: Path) -> None:
    """What `run` does, all steps and the report."""
    settings = {step.name: json.loads(config[step.name].to_json_best_effort()) for step in STEPS}
    ledger = open_ledger(directory, settings)
    left = unfinished(directory, ledger, settings)
    began, minutes = time.monotonic(), sum(config.minutes[step.name] for step in left)
    print(
        f"{directory}: "
        + (
            f"about {round(minutes) or 1} minutes on two CPU cores; stop it when you like, the same command goes on"
            if left
            else "everything is there"
        ),
        flush=True,
    )
    for number, step in enumerate(STEPS, 1):
        head = f"[{number}/{len(STEPS) + 1}] {step.does}"
        if step not in left:
            print(f"{head}: finished before, in {clock_time(ledger['steps'][step.name]['seconds'])}", flush=True)
            continue
        to_go = sum(config.minutes[other.name] for other in left[left.index(step) :])
        gone = clock_time(time.monotonic() - began)
        print(f"\n{head}  ({gone} gone, about {round(to_go) or 1} min left)", flush=True)
        take(step, config[step.name], directory, ledger, settings)
    page = report.write(directory)
    print(
        f"\n[{len(STEPS) + 1}/{len(STEPS) + 1}] report, after {clock_time(time.monotonic() - began)}: open it in a "
        f"browser\n{page.absolute()}",
        flush=True,
    )


@contextlib.contextmanager
def undrawable_untold() -> Iterator[None]:
    """Hides the names of the emoji that cannot be drawn: no news to who watches the demo."""
    told = logging.getLogger(drawing.__name__)
    level = told.level
    told.setLevel(logging.ERROR)
    try:
        yield
    finally:
        told.setLevel(level)


def take(step: Step, config: ConfigDict, directory: Path, ledger: dict[str, Any], settings: dict[str, Any]) -> None:
    """Runs one step and notes how long it took; a step that was broken off before is noted as begun twice."""
    note = ledger["steps"].setdefault(step.name, {"runs": 0})
    note |= {"runs": note["runs"] + 1 if "seconds" not in note else 1, "settings": settings[step.name]}
    note.pop("seconds", None)
    write_json(directory / LEDGER, ledger)
    began = time.monotonic()
    step.run(config, str(directory))
    note["seconds"] = round(time.monotonic() - began, 1)
    write_json(directory / LEDGER, ledger)


def open_ledger(directory: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The notes of earlier runs in this workdir.

    Raises:
      ValueError: they are of other training settings.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / LEDGER
    ledger = read_json(path) if path.is_file() else {"machine": machine(), "steps": {}}
    for step in STEPS:
        before = ledger["steps"].get(step.name, {"settings": settings[step.name]})["settings"]
        if step.trains and before != settings[step.name]:
            fields = ", ".join(differing(step.name, before, settings[step.name]))
            raise ValueError(f"{directory} was begun with another {fields}: take another --workdir, or delete this one")
    return ledger


def differing(name: str, a: Any, b: Any) -> list[str]:
    """Dotted names of the fields in which two configs differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [
            field
            for key in sorted({*a, *b})
            if a.get(key) != b.get(key)
            for field in differing(f"{name}.{key}", a.get(key), b.get(key))
        ]
    return [name]


def unfinished(directory: Path, ledger: dict[str, Any], settings: dict[str, Any]) -> list[Step]:
    """The steps to take: the first that is not finished, and all behind it.

    Raises:
      ValueError: a network is not there, but others that were trained from it are.
    """
    done = [is_done(step, directory, ledger, settings) for step in STEPS]
    if all(done):
        return []
    first = done.index(False)
    for step, finished in zip(STEPS[first:], done[first:], strict=True):
        if step.trains and finished:
            raise ValueError(
                f"{directory / STEPS[first].product} is not there, but {directory / step.product}, which "
                "comes after it, is: take another --workdir, or delete this one"
            )
    return list(STEPS[first:])


def is_done(step: Step, directory: Path, ledger: dict[str, Any], settings: dict[str, Any]) -> bool:
    """Whether a step was finished with these settings and its product is still there."""
    note = ledger["steps"].get(step.name, {})
    return "seconds" in note and note["settings"] == settings[step.name] and (directory / step.product).is_file()
