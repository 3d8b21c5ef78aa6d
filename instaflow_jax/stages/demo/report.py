"""The demo's report: one self-contained HTML page, with its tables and images embedded."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

from instaflow_jax import pipeline
from instaflow_jax.data.openmoji.dataset import ATTRIBUTION
from instaflow_jax.infra.files import read_json, write_text
from instaflow_jax.infra.progress import clock_time
from instaflow_jax.stages.common.paper import TABLE_1
from instaflow_jax.stages.evaluate import figures
from instaflow_jax.stages.evaluate import stage as evaluate
from instaflow_jax.stages.evaluate.models import NO_MODELS
from instaflow_jax.stages.evaluate.table import COLUMNS, MORE, Column, Row, cell, label

PAGE = "report.html"
LEDGER = "demo.json"  # the settings that the workdir was made with, and the time of each step
TEMPLATE = pipeline.EMBEDDED / "report.html"
# A row of the paper's Table 1, its model and N → the model and N of our row that was made in the same way.
COUNTERPARTS = {
    ("Stable Diffusion 1.5", 25): ("teacher", 25),
    ("2-rectified flow", 25): ("reflow", 25),
    ("2-rectified flow", 1): ("reflow", 1),
    ("Stable Diffusion, distilled progressively", 1): ("progressive_1", 1),
    ("Stable Diffusion, distilled progressively", 2): ("progressive_2", 2),
    ("Stable Diffusion, distilled progressively", 4): ("progressive_4", 4),
    ("Stable Diffusion 1.4, distilled directly", 1): ("direct", 1),
    ("2-rectified flow, distilled (short training)", 1): ("distill", 1),
    ("InstaFlow-0.9B: the same, trained for longer", 1): None,
    ("InstaFlow-1.7B: as a Stacked U-Net", 1): ("stacked", 1),
}
HEADLINE = (
    ("teacher", 25, "the teacher in 25 steps"),
    ("teacher", 1, "the teacher in one step"),
    ("direct", 1, "distilled directly, one step"),
    ("progressive_1", 1, "distilled progressively, one step"),
    ("distill", 1, "<b>reflow, then distilled, one step</b>"),
    ("distill_lpips", 1, "… and then by LPIPS"),
    ("stacked", 1, "reflow, then distilled into two U-Nets in series, one step"),
    ("refine", 1, "reflow, then refined, which the paper does not have, one step"),
    ("refine", 2, "the same, two steps"),
)
IN_BOTH = ("seconds", "fd_emoji", "clip_score")  # keys of our columns that the paper's table has too, in our order


def write(workdir: Path) -> Path:
    """Writes `workdir`/report.html from the stages' results there, and returns its path.

    Raises:
      FileNotFoundError, ValueError: the evaluation or the demo has not finished there, or its files are damaged.
    """
    directory = workdir / evaluate.DIRECTORY
    results, ledger = (read_json(_existing(path)) for path in (directory / evaluate.RESULTS, workdir / LEDGER))
    rows, about = results["rows"], results["about"]
    fields = {
        "headline": headline(rows),
        "grid": image(directory / figures.GRID),
        "table": table(rows, COLUMNS),
        "meanings": meanings(COLUMNS),
        "more": table(rows, MORE),
        "more_meanings": meanings(MORE),
        "conditions": html.escape(evaluate.conditions(about["config"], about)),
        "paper": paper(rows),
        "straightness": straightness(directory, rows),
        "few_steps": image(directory / figures.FEW_STEPS),
        "guidance": image(directory / figures.GUIDANCE),
        "trajectories": image(directory / figures.TRAJECTORIES),
        "steps": steps(ledger["steps"]),
        "machine": html.escape(machine(ledger["machine"])),
        "workdir": html.escape(str(workdir)),
        "path": html.escape(about["config"]["show"]["path"]),
        "attribution": html.escape(ATTRIBUTION),
    }
    write_text(workdir / PAGE, Template(TEMPLATE.read_text(encoding="utf-8")).substitute(fields))
    return workdir / PAGE


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run configs/demo.py to its end first")
    return path


def image(path: Path) -> str:
    """A PNG as the source of an <img>."""
    return "data:image/png;base64," + base64.b64encode(_existing(path).read_bytes()).decode()


def find(rows: Sequence[Row], model: str, N: int) -> Row | None:
    return next((row for row in rows if (row["model"], row["N"]) == (model, N)), None)


def straightness(directory: Path, rows: Sequence[Row]) -> str:
    """The curve of S, where there are three points to draw."""
    if not find(rows, "reflow_3", 1):
        return ""
    caption = "S of the teacher (k = 1) and of the k-rectified flows: each reflow makes the paths straighter."
    source = image(directory / figures.STRAIGHTNESS)
    return f'<figure><img src="{source}" alt="curve of S"><figcaption>{caption}</figcaption></figure>'


def headline(rows: Sequence[Row]) -> str:
    """The main results in numbers, without a claim that they might not support."""
    heads = ("", "images that show<br>their prompt", "Fréchet distance<br>to real emoji")
    heads += ("… when only the kind<br>is prompted, “a flag”", "time for<br>an image")
    lines = ["".join(f"<th>{head}</th>" for head in heads)]
    for model, N, what in HEADLINE:
        row = find(rows, model, N)
        if row:
            cells = (what, f"{row['found']:.0%}", f"{row['fd_emoji']:.1f}", f"{row['fd_kinds']:.1f}")
            lines.append("".join(f"<td>{text}</td>" for text in (*cells, f"{1000 * row['seconds']:.0f} ms")))
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def table(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """The rows as an HTML table, with a line above each new model."""
    lines, before = [_line("th", ["", *(column.heading for column in columns)])], None
    for row in rows:
        model = "real" if row["model"] in NO_MODELS else row["model"]
        attribute = ' class="first"' if model != before else ""
        lines.append(_line("td", [label(row), *(cell(row, column) for column in columns)], attribute))
        before = model
    return f"<table>{''.join(lines)}</table>"


def _line(tag: str, cells: Sequence[Any], attribute: str = "") -> str:
    return f"<tr{attribute}>" + "".join(f"<{tag}>{html.escape(str(text))}</{tag}>" for text in cells) + "</tr>\n"


def meanings(columns: Sequence[Column]) -> str:
    return "".join(
        f"<dt>{html.escape(column.heading)} <small>({column.better} is better)</small></dt>"
        f"<dd>{html.escape(column.meaning)}</dd>\n"
        for column in columns
    )


def paper(rows: Sequence[Row]) -> str:
    """Rows of the paper's Table 1; each also has our row that was made in the same way."""
    lines = [
        '<tr><th colspan="5">the paper, photographs</th><th colspan="4">here, emoji</th></tr>\n',
        _line("th", ["", "steps", "s / image", "FID", "CLIP", "", "s / image", "FD", "CLIP"]),
    ]
    for what, N, seconds, fid, clip in TABLE_1.figures:
        counterpart = COUNTERPARTS[what, N]
        row = find(rows, *counterpart) if counterpart else None
        if counterpart and not row:
            continue  # not a part of this demo
        theirs = [what, N, f"{seconds:.2f}", f"{fid:.1f}", f"{clip:.3f}"]
        ours = [label(row), *(cell(row, column) for column in COLUMNS if column.key in IN_BOTH)] if row else ["–"] * 4
        lines.append(_line("td", [*theirs, *ours]))
    return f'<table class="paper">{"".join(lines)}</table>'


def steps(entries: dict[str, Any]) -> str:
    """What each step of the demo did, and its time, from the ledger's entries."""
    lines = [_line("th", ["stage", "what it did", "time"])]
    for name, entry in entries.items():
        runs = f", in the last of {entry['runs']} runs" if entry["runs"] > 1 else ""
        lines.append(_line("td", [name, describe(name, entry["settings"]), clock_time(entry["seconds"]) + runs]))
    total = clock_time(sum(entry["seconds"] for entry in entries.values()))
    lines.append(_line("td", ["", "total, without the installation", total], ' class="first"'))
    return f'<table class="words">{"".join(lines)}</table>'


def describe(name: str, settings: dict[str, Any]) -> str:
    """The settings of one step in one line."""
    if name == "generate":
        count, N, alpha = (settings[key] for key in ("count", "N", "alpha"))
        return f"{count:,} pairs (noise, prompt, image) from the teacher: {N} steps, guidance {alpha:g}"
    if name == "evaluate":
        return f"{settings['count']:,} images for each row of the table"
    if name == "export":
        return "the one-step model as " + ", ".join(settings["formats"])
    if name == "progressive":
        N, rounds = settings["rounds"]["N"], sum(settings["rounds"]["steps"])
        training = f"{rounds:,} training steps of batch size {settings['batch_size']}, in rounds for N = {list(N)}"
        return f"{training}, starting from the teacher, on the teacher's pairs"
    if name == "reflow_3":
        settings = settings | settings["later"]
    loss = f" by {settings['distance'].upper()}" if "distance" in settings else ""
    if name == "refine":
        loss = " by score distillation"
    source = {"reflow": "the teacher", "direct": "the teacher", "lpips": "the one-step model"}.get(name, "2-RF")
    count, steps = settings["pairs"]["count"], settings["loop"]["steps"]
    pairs = "the teacher's pairs" if source == "the teacher" else f"{count:,} pairs of 2-RF's own"
    return f"{steps:,} training steps of batch size {settings['batch_size']}{loss}, starting from {source}, on {pairs}"


def machine(found: dict[str, Any]) -> str:
    return f"{found['device']}, as {found['devices']} device{'s' if found['devices'] > 1 else ''}; jax {found['jax']}"
