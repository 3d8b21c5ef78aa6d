"""The figures of `evaluate`: two curves, one seed's paths, and every model's images from the same noise.

The only file that uses matplotlib.
"""

import io
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from instaflow_jax.infra import files, images
from instaflow_jax.stages.evaluate.measures import Measurements
from instaflow_jax.stages.evaluate.models import Model, count_reflows
from instaflow_jax.stages.evaluate.table import Row

FEW_STEPS, GUIDANCE, TRAJECTORIES, GRID = "few_steps.png", "guidance.png", "trajectories.png", "grid.png"
STRAIGHTNESS = "straightness.png"
_SIDE = 96  # pixels that a small image is enlarged to
_COLOURS = {
    "teacher": "#666666",
    "reflow": "#1f6fb4",
    "reflow_3": "#2a9d8f",
    "distill": "#d1495b",
    "distill_lpips": "#7b2d8b",
    "direct": "#edae49",
    "refine": "#2e7d32",
    "consistency": "#17becf",
    "stacked": "#e377c2",
    "stacked_direct": "#bcbd22",
    "progressive_1": "#8c564b",  # the last round's, for the line of all rounds
}
_MARKERS = {
    "teacher": "s",
    "reflow": "o",
    "distill": "D",
    "distill_lpips": "P",
    "direct": "X",
    "refine": "v",
    "consistency": "*",
    "stacked": "^",
    "stacked_direct": "<",
}
_LINE = {"linewidth": 2, "markersize": 7}
_DPI = 110


def write(
    directory: Path,
    measurements: Measurements,
    models: list[Model],
    rows: Sequence[Row],
    guidance_rows: Sequence[Row],
    prompts: list[str],
) -> None:
    """Writes all figures to `directory`; no guidance curve and no curve of S if there are no rows for it."""
    few_steps(directory / FEW_STEPS, rows)
    if any(model.name == "reflow" for model in models):
        straightness(directory / STRAIGHTNESS, rows)
    if guidance_rows:
        guidance(directory / GUIDANCE, guidance_rows)
    trajectories(directory / TRAJECTORIES, measurements, models)
    grid(directory / GRID, measurements, models, prompts)


# ---------------------------------------------------------------- images


def columns(models: list[Model]) -> list[tuple[Model, int]]:
    """The grid's columns: one step of each model, and the most steps of teacher and k-RF, where evaluated."""
    return [
        (model, N)
        for model in models
        for N in dict.fromkeys((max(model.N), 1))
        if N in model.N and (N == 1 or count_reflows(model.name))
    ]


def grid(path: Path, measurements: Measurements, models: list[Model], prompts: list[str]) -> None:
    """A row for each prompt, a column for each model, the same noise throughout."""
    chosen = columns(models)
    shown = [measurements.row(model, N, model.alpha)[0].arrays["shown"] for model, N in chosen]
    _save_grid(path, np.stack(shown, axis=1), prompts, [f"{model.title}, {N}" for model, N in chosen])


def trajectories(path: Path, measurements: Measurements, models: list[Model]) -> None:
    """Two rows each for teacher, 2-RF and one-step model: Z_t with t growing to the right, and where v points."""
    rows, labels = [], []
    for model in models:
        if model.name in ("teacher", "reflow", "distill"):
            N = 1 if model.name == "distill" else max(model.N)
            arrays = measurements.path(model, N)[0].arrays
            rows += [arrays["until"], arrays["endpoint"]]
            labels += [f"{model.title}, N = {N}: on the way", "   … and where it points"]
    _save_grid(path, np.stack(rows), labels, [f"t = {t:.1f}" for t in np.linspace(0, 1, len(rows[0]))])


def _save_grid(path: Path, cells: UInt8[np.ndarray, "R C H W 3"], rows: list[str], columns: list[str]) -> None:
    drawn = images.grid(
        cells.reshape(-1, *cells.shape[2:]),
        columns=len(columns),
        row_labels=rows,
        column_labels=columns,
        scale=max(1, _SIDE // cells.shape[3]),
    )
    images.save_png(path, drawn, {"rows": "|".join(rows), "columns": "|".join(columns)})


# ---------------------------------------------------------------- curves


def few_steps(path: Path, rows: Sequence[Row]) -> None:
    """Quality against the number of steps, one line per title: Fréchet distance, and images found."""
    figure, axes = _figure(2)
    from matplotlib import ticker

    best = {row["model"]: row for row in rows}["decoded"]
    names = {row["title"]: row["model"] for row in rows if row["N"]}
    steps = sorted({row["N"] for row in rows if row["N"]})
    for axis, key, scale, title in (
        (axes[0], "fd_emoji", 1, "Fréchet distance to real emoji (less is better)"),
        (axes[1], "found", 100, "images that show their prompt, % (more is better)"),
    ):
        others = itertools.count()
        for label, name in names.items():
            line = sorted((row["N"], scale * row[key]) for row in rows if row["title"] == label)
            colour, marker = _COLOURS.get(name) or f"C{next(others)}", _MARKERS.get(name, "v")
            axis.plot(*zip(*line, strict=True), color=colour, marker=marker, label=label, **_LINE)
        label = "emoji through the autoencoder: the best possible"
        axis.axhline(scale * best[key], color="black", linestyle=":", linewidth=1, label=label)
        axis.set_xscale("log", base=2)
        axis.set_xticks(steps, [str(N) for N in steps])
        axis.minorticks_off()
        axis.set_xlabel("steps")
        axis.set_title(title, fontsize=11)
    axes[0].set_yscale("log")  # the teacher's distance at one step is ten times the others
    axes[0].yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes[0].yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes[0].minorticks_off()
    axes[1].set_ylim(0, 100)
    lines, labels = axes[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    _save(figure, path)


def guidance(path: Path, rows: Sequence[Row]) -> None:
    """Fréchet distance against CLIP score for growing guidance."""
    figure, (axis,) = _figure(1)
    line = [(row["clip_score"], row["fd_emoji"]) for row in rows]
    axis.plot(*zip(*line, strict=True), color=_COLOURS["reflow"], marker=_MARKERS["reflow"], **_LINE)
    for (x, y), row in zip(line, rows, strict=True):
        axis.annotate(f"α = {row['alpha']:g}", (x, y), textcoords="offset points", xytext=(8, 4), fontsize=10)
    axis.set_xlabel("CLIP score (more is better)")
    axis.set_ylabel("Fréchet distance to real emoji (less is better)")
    axis.set_title(f"guidance of {rows[0]['title'].split(',')[0]}, {rows[0]['N']} steps", fontsize=11)
    axis.margins(0.2)
    _save(figure, path)


def straightness(path: Path, rows: Sequence[Row]) -> None:
    """S of the k-rectified flows against k, with error bars of one standard error; k = 1 is the teacher."""
    figure, (axis,) = _figure(1)
    line = sorted((k, row["S"], row["S_error"]) for row in rows if "S" in row and (k := count_reflows(row["model"])))
    k, S, error = zip(*line, strict=True)
    axis.errorbar(k, S, error, color=_COLOURS["reflow"], marker=_MARKERS["reflow"], capsize=4, **_LINE)
    axis.set_yscale("log")
    axis.set_xticks(k, [f"{number}-RF" if number > 1 else "teacher" for number in k])
    axis.margins(0.2)
    axis.set_title("straightness S (less is better)", fontsize=11)
    _save(figure, path)


def _figure(count: int):
    """A figure of `count` axes side by side, and the axes."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, count, figsize=(5.2 * count, 4.2), dpi=_DPI, squeeze=False, layout="constrained")
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#dddddd", linewidth=0.6)
    return figure, axes[0]


def _save(figure, path: Path) -> None:
    from matplotlib import pyplot

    content = io.BytesIO()
    figure.savefig(content, format="png")
    files.write_bytes(path, content.getbuffer())
    pyplot.close(figure)
