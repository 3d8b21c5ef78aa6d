"""What `evaluate` draws: two curves, the roads of one seed, and everybody's pictures from the same noise."""

from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from instaflow_jax.infra import images
from instaflow_jax.stages.evaluate import figures as evaluate_plots
from instaflow_jax.stages.evaluate.measures import Bench
from instaflow_jax.stages.evaluate.models import Model

FEW_STEPS, GUIDANCE, TRAJECTORIES, GRID = "few_steps.png", "guidance.png", "trajectories.png", "grid.png"
_SIDE = 96  # pixels that a small picture is enlarged to


def write(directory: Path, config: ConfigDict, bench: Bench, models: list[Model], results: dict[str, Any]) -> None:
    """Writes all of them; no guidance curve where there is no 2-rectified flow."""
    evaluate_plots.few_steps(directory / FEW_STEPS, results["rows"])
    if results["guidance"]:
        evaluate_plots.guidance(directory / GUIDANCE, results["guidance"])
    trajectories(directory / TRAJECTORIES, config, bench, models)
    grid(directory / GRID, config, bench, models)


def columns(models: list[Model]) -> list[tuple[Model, int]]:
    """Who stands beside whom: each model at its most steps, and at one, as far as it was judged so."""
    return [
        (model, N)
        for model in models
        for N in dict.fromkeys((max(model.steps), 1))
        if N in model.steps and (N == 1 or model.name in ("teacher", "reflow"))
    ]


def grid(path: Path, config: ConfigDict, bench: Bench, models: list[Model]) -> None:
    """A row a prompt, a column a model, the same noise throughout."""
    chosen = columns(models)
    shown = np.stack([bench.row(model, N, model.alpha)[0].arrays["shown"] for model, N in chosen], axis=1)
    labels = [f"{model.title}, {N}" for model, N in chosen]
    _save(path, shown, list(config.show.prompts), labels)


def trajectories(path: Path, config: ConfigDict, bench: Bench, models: list[Model]) -> None:
    """For teacher, 2-RF and one-step model two rows: Z_t, t growing to the right, and where its velocity points."""
    rows, labels = [], []
    for model in models:
        if model.name not in ("teacher", "reflow", "distill"):
            continue
        N = 1 if model.name == "distill" else max(model.steps)
        road = bench.path(model, N)[0].arrays
        rows += [road["on_the_way"], road["foreseen"]]
        labels += [f"{model.title}, N = {N}: on the way", "   … and where it points"]
    times = np.linspace(0, 1, len(rows[0]))
    _save(path, np.stack(rows), labels, [f"t = {t:.1f}" for t in times])


def _save(path: Path, pictures: np.ndarray, row_labels: list[str], column_labels: list[str]) -> None:
    """`pictures` is [rows, columns, H, W, 3]."""
    made = images.grid(
        pictures.reshape(-1, *pictures.shape[2:]),
        columns=pictures.shape[1],
        row_labels=row_labels,
        column_labels=column_labels,
        scale=max(1, _SIDE // pictures.shape[3]),
    )
    images.save_png(path, made, {"rows": "|".join(row_labels), "columns": "|".join(column_labels)})
