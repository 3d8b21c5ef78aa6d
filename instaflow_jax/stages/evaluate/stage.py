"""Stage `evaluate`: the teacher and the flows of a workdir in one table, with figures (embedded world only)."""

import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from instaflow_jax import __version__, pipeline
from instaflow_jax.data.openmoji import dataset as openmoji
from instaflow_jax.infra.files import write_json, write_text
from instaflow_jax.stages.common.loading import EXPORT
from instaflow_jax.stages.common.machine import machine
from instaflow_jax.stages.common.ranges import check_ranges
from instaflow_jax.stages.evaluate import figures, judge, models, table
from instaflow_jax.stages.evaluate.cache import Record
from instaflow_jax.stages.evaluate.measures import Measurements, Options
from instaflow_jax.stages.evaluate.models import Entry, Model

DIRECTORY, RESULTS, TABLE = "evaluate", "results.json", "table.md"


def run(config: ConfigDict, workdir: str) -> None:
    """Writes `workdir`/evaluate/ about the models that are in `workdir`: results.json, table.md and figures.

    Raises:
      ValueError, FileNotFoundError: a field of the config, or a model, is wrong.
    """
    found, root = check(config, workdir), Path(workdir)
    data = openmoji.load(config.data_dir or root / "data")
    directory = root / DIRECTORY
    measurements = Measurements(read_options(config), directory / "measured", data, found[0])
    rows, guidance = measure(measurements, found, config.guidance.N, tuple(config.guidance.alphas))
    figures.write(directory, measurements, found, rows, guidance, list(config.show.prompts))
    about = {
        "code": f"instaflow_jax {__version__}",
        "machine": machine(),
        "teacher_alpha": found[0].alpha,
        "weights": {model.name: model.weights for model in found},
        "config": json.loads(config.to_json_best_effort()),
    }
    write_json(directory / RESULTS, {"about": about, "rows": rows, "guidance": guidance})
    write_text(directory / TABLE, table.page(rows, conditions(about["config"], about)))
    print(f"\n{table.markdown(rows, table.COLUMNS)}\nwrote {directory}", flush=True)


def check(config: ConfigDict, workdir: str) -> list[Model]:
    """Every check of `run`, without measuring; returns the models. Raises as `run` does."""
    check_fields(config, workdir)
    root = Path(workdir)
    models.check_seeds(config.seed, (root, *(root / name for name in folders(config, root))))
    return models.load(read_entries(config, root))


def check_fields(config: ConfigDict, workdir: str) -> None:
    """Every check that needs none of the models that training leaves in `workdir`.

    Raises:
      ValueError: naming field, value and rule.
      FileNotFoundError: a folder of `config.extra`, or the judge, holds no model.
    """
    if jax.process_count() > 1:
        raise ValueError("evaluate runs in one process, on all its devices; run without --processes")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("evaluate draws its curves with matplotlib, which is not installed: pip install -e .[demo]")
    check_ranges(config)
    for name in models.split_extra(config.extra):
        models.is_there(Path(workdir), name)
    judge.load_networks(pipeline.locate(config.judge))


def folders(config: ConfigDict, workdir: Path) -> tuple[str, ...]:
    """Folders of the workdir that may hold a flow. Raises ValueError for a wrong `config.extra`."""
    return *models.find_flows(workdir), *models.split_extra(config.extra)


def read_entries(config: ConfigDict, workdir: Path) -> list[Entry]:
    """The teacher, the flows that exist, and those that `config.extra` names, which are evaluated like `distill`.

    Raises:
      FileNotFoundError: a folder of `config.extra` holds no model, or nothing states the teacher's guidance.
    """
    teacher = config.teacher
    alpha = teacher.alpha or models.alpha_of_pairs(workdir)
    names = [name for name in folders(config, workdir) if models.is_there(workdir, name)]
    flows = [Entry(name, str(workdir / name / EXPORT), *read_solving(config, name)) for name in names]
    return [Entry("teacher", teacher.model, float(alpha), tuple(teacher.N)), *flows]


def read_solving(config: ConfigDict, name: str) -> tuple[float, tuple[int, ...]]:
    """Guidance and numbers of steps of the flow in the folder `name`."""
    steps = models.count_steps(name)
    if steps:
        return 1.0, (steps,)  # the guidance is in the weights
    block = "stacked" if name in models.STACKED else name if name in models.FLOWS else "distill"
    block = config["reflow" if models.count_reflows(name) else block]
    return float(block.alpha), tuple(block.N)


def read_options(config: ConfigDict) -> Options:
    """What `Measurements` needs of the config."""
    return Options(
        **{name: config[name] for name in ("judge", "count", "seed", "neighbours", "batch", "repeats")},
        straightness_N=config.straightness.N,
        straightness_count=config.straightness.count,
        shown_prompts=tuple(config.show.prompts),
        path_prompt=config.show.path,
        path_points=config.show.points,
    )


def measure(
    measurements: Measurements, found: list[Model], guidance_N: int, alphas: tuple[float, ...]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of the table, and rows of the 2-rectified flow at several guidance scales; prints each of them."""
    reflow = next((model for model in found if model.name == "reflow"), None)
    alphas = alphas if reflow else ()
    log = Log(3 + len(found) + sum(len(model.N) for model in found) + len(alphas))
    log({"title": "the teacher's images for comparison", "N": 0}, *measurements.reference())
    rows = [
        log({"model": name, "title": title, "N": 0}, *measurements.real(decoded))
        for name, title, decoded in (("real", "real emoji", False), ("decoded", "… through the autoencoder", True))
    ]
    for model in found:
        S = log({"title": f"{model.title}, straightness", "N": 0}, *measurements.straightness(model))
        first = len(rows)
        for N in model.N:
            row = {"model": model.name, "title": model.title, "alpha": model.alpha, "N": N}
            row |= measurements.seconds(model, N)[0].numbers
            rows.append(log(row, *measurements.row(model, N, model.alpha)))
        rows[first] |= {key: S[key] for key in ("S", "S_error")}
    guidance = []
    for alpha in alphas:
        row = {"model": reflow.name, "title": f"{reflow.title}, alpha {alpha:g}", "N": guidance_N, "alpha": alpha}
        guidance.append(log(row, *measurements.row(reflow, guidance_N, alpha)))
    return rows, guidance


class Log:
    """Prints one line for each measurement, counted up to `total`."""

    def __init__(self, total: int):
        self._total, self._done, self._began = total, 0, time.monotonic()

    def __call__(self, row: dict[str, Any], record: Record, cached: bool) -> dict[str, Any]:
        """The row with the record's numbers in it."""
        now, row = time.monotonic(), row | record.numbers
        self._done += 1
        cells = [f"{column.heading} {table.cell(row, column)}" for column in table.COLUMNS if column.key in row]
        took = "measured before" if cached else f"{now - self._began:.1f} s"
        line = ": ".join(filter(None, (table.label(row), ", ".join(cells))))
        print(f"{self._done}/{self._total} {line} ({took})", flush=True)
        self._began = now
        return row


def conditions(config: dict[str, Any], about: dict[str, Any]) -> str:
    """How the numbers were made, in one paragraph."""
    device = about["machine"]
    samples = min(config["straightness"]["count"], config["count"])
    return (
        f"{config['count']} prompts: full names of emoji drawn without replacement, or their kinds. Every row starts "
        f"from the same noise, of seed {config['seed']}, which no training pair used; training saw the prompts. "
        f"Teacher: DPM-Solver, guidance {about['teacher_alpha']:g}, as in its pairs. Flows: Euler, guidance "
        f"{config['reflow']['alpha']:g}. S: {config['straightness']['N']} Euler steps, {samples} samples. "
        f"Seconds: {device['device']}, one of {device['devices']} devices, jax {device['jax']}."
    )
