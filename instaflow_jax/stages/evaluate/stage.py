"""Stage `evaluate`: teacher and flows of a workdir on one table, with pictures; the embedded world's own measures."""

import importlib.util
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from instaflow_jax import __version__
from instaflow_jax.infra import files
from instaflow_jax.infra.files import write_json
from instaflow_jax.stages.evaluate import models as evaluate_models
from instaflow_jax.stages.evaluate import pictures as evaluate_pictures
from instaflow_jax.stages.evaluate import table as evaluate_table
from instaflow_jax.stages.evaluate.cache import Record
from instaflow_jax.stages.evaluate.measures import Bench, machine
from instaflow_jax.stages.evaluate.models import Model

DIRECTORY, RESULTS, TABLE = "evaluate", "results.json", "table.md"
_REAL = (("real", "real emoji", False), ("decoded", "… through the autoencoder", True))


def run(config: ConfigDict, workdir: str) -> None:
    """Writes `workdir`/evaluate/: results.json, table.md and pictures, of the models that are in `workdir`.

    Raises:
      ValueError, FileNotFoundError: a field of the config, or a model, is wrong.
    """
    check(config)
    models = evaluate_models.load(config, Path(workdir))
    evaluate_models.check_seeds(config, Path(workdir))
    bench = Bench(config, Path(workdir), models[0])
    directory = Path(workdir) / DIRECTORY
    results = measure(config, bench, models)
    evaluate_pictures.write(directory, config, bench, models, results)
    write_json(directory / RESULTS, results)
    with files.atomic_write(directory / TABLE) as temporary:
        temporary.write_text(markdown(results), encoding="utf-8")
    print(f"\n{evaluate_table.markdown(results['rows'], evaluate_table.COLUMNS)}\nwrote {directory}", flush=True)


def check(config: ConfigDict) -> None:
    """Cross-field checks, before anything is loaded.

    Raises:
      ValueError: naming field, value and rule.
    """
    if jax.process_count() > 1:
        raise ValueError("evaluate runs in one process, on all its devices: leave --processes away")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("evaluate draws its curves with matplotlib, which is not installed: pip install -e .[demo]")
    for name, least in (("batch", 1), ("repeats", 1), ("seed", 0)):
        if config[name] < least:
            raise ValueError(f"config.{name}={config[name]} must be at least {least}")
    for name in ("teacher", *evaluate_models.FLOWS):
        if not config[name].N or min(config[name].N) < 1:
            raise ValueError(f"config.{name}.N={tuple(config[name].N)} must be numbers of steps, 1 or more")
    evaluate_models.folders(config)
    if config.show.points < 2 or config.straightness.count < 2:
        raise ValueError(
            f"config.show.points={config.show.points} and config.straightness.count="
            f"{config.straightness.count} must be at least 2"
        )


def measure(config: ConfigDict, bench: Bench, models: list[Model]) -> dict[str, Any]:
    """All numbers: {"about", "rows", "guidance"}; says each when it is there."""
    tell = Tell(
        len(models)
        + 3
        + sum(len(model.steps) for model in models)
        + (len(config.guidance.alphas) if len(models) > 1 else 0)
    )
    tell({"title": "the teacher's pictures to compare with", "N": 0}, *bench.reference())
    rows = [tell({"model": name, "title": title, "N": 0}, *bench.real(decoded)) for name, title, decoded in _REAL]
    for model in models:
        straight = tell({"title": f"{model.title}, straightness", "N": 0}, *bench.straightness(model))
        names = {"model": model.name, "title": model.title, "alpha": model.alpha}
        model_rows = [
            tell(names | {"N": N} | bench.seconds(model, N)[0].numbers, *bench.row(model, N, model.alpha))
            for N in model.steps
        ]
        model_rows[0] |= {name: straight[name] for name in ("S", "S_error")}
        rows += model_rows
    return {"about": about(config, models), "rows": rows, "guidance": list(guidance(config, bench, models, tell))}


def guidance(config: ConfigDict, bench: Bench, models: list[Model], tell: "Tell") -> Iterator[dict[str, Any]]:
    """Rows of the 2-rectified flow at several guidance scales; none where it is not there."""
    for model in models:
        if model.name == "reflow":
            N = config.guidance.N
            for alpha in config.guidance.alphas:
                yield tell(
                    {"model": model.name, "title": f"{model.title}, alpha {alpha:g}", "N": N, "alpha": alpha},
                    *bench.row(model, N, alpha),
                )


class Tell:
    """One line a measurement, counted."""

    def __init__(self, count: int):
        self._count, self._done, self._began = count, 0, time.monotonic()

    def __call__(self, row: dict[str, Any], record: Record, known: bool) -> dict[str, Any]:
        """The row with its numbers in it."""
        now, row = time.monotonic(), row | record.numbers
        self._done += 1
        told = [
            f"{column.heading} {evaluate_table.cell(row, column)}"
            for column in evaluate_table.COLUMNS
            if column.key in row
        ]
        print(
            f"{self._done}/{self._count} {evaluate_table.label(row)}{': ' if told else ''}{', '.join(told)} "
            f"({'measured before' if known else f'{now - self._began:.1f} s'})",
            flush=True,
        )
        self._began = now
        return row


def about(config: ConfigDict, models: list[Model]) -> dict[str, Any]:
    """What is needed to know what the numbers mean."""
    return {
        "code": f"instaflow_jax {__version__}",
        "machine": machine(),
        "teacher_alpha": models[0].alpha,
        "weights": {model.name: model.weights for model in models},
        "config": json.loads(config.to_json_best_effort()),
    }


def markdown(results: dict[str, Any]) -> str:
    """Both tables, what their columns mean, and what they were measured on."""
    found, config = results["about"], results["about"]["config"]
    columns = (*evaluate_table.COLUMNS, *evaluate_table.MORE)
    meanings = "".join(f"* **{column.heading}**, {column.better} is better. {column.meaning}\n" for column in columns)
    tables = "\n".join(
        evaluate_table.markdown(results["rows"], some) for some in (evaluate_table.COLUMNS, evaluate_table.MORE)
    )
    return f"{tables}\n{meanings}\n{conditions(config, found)}\n"


def conditions(config: dict[str, Any], found: dict[str, Any]) -> str:
    """In one paragraph, how the numbers were made."""
    device = found["machine"]
    return (
        f"{config['count']} prompts, full names of emoji drawn without replacement, or their kinds; the same noise for every "
        f"row, of seed {config['seed']}, which no training pair used (the prompts are names that training saw too). "
        f"Teacher: DPM-Solver, guidance {found['teacher_alpha']:g}, as in its pairs; flows: Euler, guidance "
        f"{config['reflow']['alpha']:g}. S: {config['straightness']['N']} Euler steps, "
        f"{min(config['straightness']['count'], config['count'])} samples. Seconds: {device['device']}, one of "
        f"{device['devices']} devices, jax {device['jax']}."
    )
