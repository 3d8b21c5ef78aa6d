"""The curves of `evaluate`; the only file that knows matplotlib."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from instaflow_jax.infra import files
from instaflow_jax.stages.evaluate.table import Row

_COLOURS = {
    "teacher": "#666666",
    "reflow": "#1f6fb4",
    "distill": "#d1495b",
    "distill_lpips": "#7b2d8b",
    "direct": "#edae49",
}
_MARKERS = {"teacher": "s", "reflow": "o", "distill": "D", "distill_lpips": "P", "direct": "X"}
_DPI = 110


def few_steps(path: Path, rows: Sequence[Row]) -> None:
    """Quality against the number of steps, a line a model: Fréchet distance and pictures found."""
    figure, axes = _figure(2)
    from matplotlib import ticker

    floor = {row["model"]: row for row in rows}["decoded"]
    for axis, key, scale, title in (
        (axes[0], "fd_emoji", 1, "Fréchet distance to real emoji (less is better)"),
        (axes[1], "found", 100, "pictures that show their prompt, % (more is better)"),
    ):
        others = itertools.count()
        for name in dict.fromkeys(row["model"] for row in rows if row["N"]):
            line = sorted((row["N"], scale * row[key]) for row in rows if row["model"] == name)
            axis.plot(
                *zip(*line, strict=True),
                color=_COLOURS.get(name) or f"C{next(others)}",
                marker=_MARKERS.get(name, "v"),
                linewidth=2,
                markersize=7,
                label=_title(rows, name),
            )
        axis.axhline(
            scale * floor[key],
            color="black",
            linestyle=":",
            linewidth=1,
            label="emoji through the autoencoder: the best possible",
        )
        steps = sorted({row["N"] for row in rows if row["N"]})
        axis.set_xscale("log", base=2)
        axis.set_xticks(steps, [str(N) for N in steps])
        axis.minorticks_off()
        axis.set_xlabel("steps")
        axis.set_title(title, fontsize=11)
    axes[0].set_yscale("log")  # the teacher's first distance is ten times the others
    axes[0].yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes[0].yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes[0].minorticks_off()
    axes[1].set_ylim(0, 100)
    axes[0].legend(frameon=False, fontsize=9)
    _save(figure, path)


def guidance(path: Path, rows: Sequence[Row]) -> None:
    """Fréchet distance against CLIP score as guidance grows."""
    figure, (axis,) = _figure(1)
    line = [(row["clip_score"], row["fd_emoji"]) for row in rows]
    axis.plot(*zip(*line, strict=True), color=_COLOURS["reflow"], marker="o", linewidth=2, markersize=7)
    for (x, y), row in zip(line, rows, strict=True):
        axis.annotate(f"α = {row['alpha']:g}", (x, y), textcoords="offset points", xytext=(8, 4), fontsize=10)
    axis.set_xlabel("CLIP score (more is better)")
    axis.set_ylabel("Fréchet distance to real emoji (less is better)")
    axis.set_title(f"guidance of {rows[0]['title'].split(',')[0]}, {rows[0]['N']} steps", fontsize=11)
    axis.margins(0.2)
    _save(figure, path)


def _title(rows: Sequence[Row], name: str) -> str:
    return next(row["title"] for row in rows if row["model"] == name)


def _figure(columns: int):
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, columns, figsize=(5.2 * columns, 4.2), dpi=_DPI, squeeze=False)
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#dddddd", linewidth=0.6)
    return figure, axes[0]


def _save(figure, path: Path) -> None:
    from matplotlib import pyplot

    figure.tight_layout()
    with files.atomic_write(path) as temporary:
        figure.savefig(temporary, format="png")
    pyplot.close(figure)
