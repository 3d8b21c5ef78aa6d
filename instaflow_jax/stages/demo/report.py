"""One self-contained page of what the demo made: tables and pictures inside, nothing fetched from anywhere."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

from instaflow_jax import pipeline
from instaflow_jax.data.openmoji.dataset import ATTRIBUTION
from instaflow_jax.infra import files
from instaflow_jax.infra.files import read_json
from instaflow_jax.infra.progress import clock_time
from instaflow_jax.stages.evaluate import models as evaluate_models
from instaflow_jax.stages.evaluate import pictures as evaluate_pictures
from instaflow_jax.stages.evaluate import stage as evaluate
from instaflow_jax.stages.evaluate.table import COLUMNS, MORE, Column, Row, cell, label

PAGE, LEDGER = "report.html", "demo.json"
TEMPLATE = pipeline.EMBEDDED / "report.html"
# The paper's Table 1 (MS COCO 2017, 5,000 captions, A100): what, steps, seconds, FID, CLIP score; and our counterpart.
PAPER = (
    ("Stable Diffusion 1.5", 25, 0.88, 20.1, 0.318, ("teacher", 25)),
    ("2-rectified flow", 25, 0.88, 21.5, 0.315, ("reflow", 25)),
    ("2-rectified flow", 1, 0.09, 47.0, 0.271, ("reflow", 1)),
    ("Stable Diffusion 1.4, distilled directly", 1, 0.09, 40.9, 0.255, ("direct", 1)),
    ("2-rectified flow, distilled (short run)", 1, 0.09, 31.0, 0.285, ("distill", 1)),
    ("InstaFlow-0.9B: the same, trained for longer", 1, 0.09, 23.4, 0.304, None),
)
HEADLINE = (
    ("teacher", 25, "the teacher in 25 steps"),
    ("teacher", 1, "the teacher in one step"),
    ("direct", 1, "distilled directly, one step"),
    ("distill", 1, "<b>reflow, then distilled, one step</b>"),
)
BESIDE = ("seconds", "fd_emoji", "clip_score")  # of our columns, in their order, those that the paper's table has too


def write(workdir: Path) -> Path:
    """Writes `workdir`/report.html from what the stages left there, and returns its path.

    Raises:
      FileNotFoundError, ValueError: evaluation or demo are not finished there, or their files are damaged.
    """
    directory = workdir / evaluate.DIRECTORY
    results, ledger = (read_json(_there(path)) for path in (directory / evaluate.RESULTS, workdir / LEDGER))
    rows, found = results["rows"], results["about"]
    fields = {
        "headline": headline(rows),
        "grid": picture(directory / evaluate_pictures.GRID),
        "table": table(rows, COLUMNS),
        "meanings": meanings(COLUMNS),
        "more": table(rows, MORE),
        "more_meanings": meanings(MORE),
        "conditions": html.escape(evaluate.conditions(found["config"], found)),
        "paper": paper(rows),
        "few_steps": picture(directory / evaluate_pictures.FEW_STEPS),
        "guidance": picture(directory / evaluate_pictures.GUIDANCE),
        "trajectories": picture(directory / evaluate_pictures.TRAJECTORIES),
        "steps": steps(ledger),
        "machine": html.escape(machine(ledger["machine"])),
        "workdir": html.escape(str(workdir)),
        "path": html.escape(found["config"]["show"]["path"]),
        "attribution": html.escape(ATTRIBUTION),
    }
    page = workdir / PAGE
    with files.atomic_write(page) as temporary:
        temporary.write_text(Template(TEMPLATE.read_text(encoding="utf-8")).substitute(fields), encoding="utf-8")
    return page


def _there(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run configs/demo.py to its end first")
    return path


def picture(path: Path) -> str:
    """A PNG as the source of an <img>."""
    return "data:image/png;base64," + base64.b64encode(_there(path).read_bytes()).decode()


def find(rows: Sequence[Row], model: str, N: int) -> Row | None:
    return next((row for row in rows if (row["model"], row["N"]) == (model, N)), None)


def headline(rows: Sequence[Row]) -> str:
    """What was found, in numbers, without a claim that they might not bear out."""
    told = []
    for model, N, what in HEADLINE:
        row = find(rows, model, N)
        if row:
            told.append(
                f"<tr><td>{what}</td><td>{row['found']:.0%}</td><td>{row['fd_emoji']:.1f}</td>"
                f"<td>{row['fd_kinds']:.1f}</td><td>{1000 * row['seconds']:.0f} ms</td></tr>"
            )
    heads = (
        "",
        "pictures that show<br>what was asked for",
        "Fréchet distance<br>to real emoji",
        "… where only the kind<br>is prompted, “a flag”",
        "time for<br>a picture",
    )
    return f"<table><tr>{''.join(f'<th>{head}</th>' for head in heads)}</tr>{''.join(told)}</table>"


def table(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """The rows as HTML, a rule where another model begins."""
    lines, before = [_line("th", ["", *(column.heading for column in columns)])], None
    for row in rows:
        kind = "real" if row["model"] in evaluate_models.NO_MODELS else row["model"]
        attribute = ' class="first"' if kind != before else ""
        lines.append(_line("td", [label(row), *(cell(row, column) for column in columns)], attribute))
        before = kind
    return f"<table>{''.join(lines)}</table>"


def _line(tag: str, cells: Sequence[str], attribute: str = "") -> str:
    return f"<tr{attribute}>" + "".join(f"<{tag}>{html.escape(str(text))}</{tag}>" for text in cells) + "</tr>\n"


def meanings(columns: Sequence[Column]) -> str:
    return "".join(
        f"<dt>{html.escape(column.heading)} <small>({column.better} is better)</small></dt>"
        f"<dd>{html.escape(column.meaning)}</dd>\n"
        for column in columns
    )


def paper(rows: Sequence[Row]) -> str:
    """The paper's table, and in the same line the row of ours that is made in the same way."""
    lines = [
        '<tr><th colspan="5">the paper, photographs</th><th colspan="4">here, emoji</th></tr>\n',
        _line("th", ["", "steps", "s / image", "FID", "CLIP", "", "s / image", "FD", "CLIP"]),
    ]
    for what, N, seconds, fid, clip, ours in PAPER:
        row = find(rows, *ours) if ours else None
        theirs = [what, N, f"{seconds:.2f}", f"{fid:.1f}", f"{clip:.3f}"]
        here = [label(row), *(cell(row, column) for column in COLUMNS if column.key in BESIDE)] if row else ["–"] * 4
        lines.append(_line("td", [*theirs, *here]))
    return f'<table class="paper">{"".join(lines)}</table>'


def steps(ledger: dict[str, Any]) -> str:
    """What each stage did, and how long it took."""
    lines = [_line("th", ["stage", "what it did", "time"])]
    total = 0.0
    for name, note in ledger["steps"].items():
        again = f", in the last of {note['runs']} runs" if note["runs"] > 1 else ""
        lines.append(_line("td", [name, describe(name, note["settings"]), clock_time(note["seconds"]) + again]))
        total += note["seconds"]
    lines.append(_line("td", ["", "in all, without installing", clock_time(total)], ' class="first"'))
    return f'<table class="words">{"".join(lines)}</table>'


def describe(name: str, settings: dict[str, Any]) -> str:
    """A stage's settings in a line."""
    if name == "generate":
        return (
            f"{settings['count']:,} pairs (noise, prompt, picture) by the teacher: {settings['N']} steps, guidance "
            f"{settings['alpha']:g}"
        )
    if name in ("reflow", "distill", "direct"):
        count = settings["pairs"]["count"]
        pairs = f", on {count:,} new pairs of 2-RF" if name == "distill" else ", on the teacher's pairs"
        start = {"reflow": "from the teacher", "distill": "from 2-RF", "direct": "from the teacher"}[name]
        loss = "" if name == "reflow" else f" by {settings['distance'].upper()}"
        return f"{settings['loop']['steps']:,} training steps of {settings['batch_size']}{loss}, {start}{pairs}"
    if name == "evaluate":
        return f"{settings['count']:,} pictures for each row of the table"
    return "the one-step model as " + ", ".join(settings["formats"])


def machine(found: dict[str, Any]) -> str:
    return f"{found['device']}, as {found['devices']} device{'s' if found['devices'] > 1 else ''}; jax {found['jax']}"
