"""The tables of `evaluate_coco`: every number of each row, and the paper's table with our rows below it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from instaflow_jax.infra.messages import markdown_table
from instaflow_jax.stages.common import paper

Row = Mapping[str, Any]  # the model, N and alpha of a row, and its results


def page(title: str, rows: Sequence[Row], number: int, device: str) -> str:
    """The tables in Markdown.

    Args:
      number: of the paper's table; 0 for none.
      device: that the seconds were measured on.
    """
    text = f"{title}; seconds on {device}\n\n{markdown(map(every_number, rows))}"
    if not number:
        return text
    theirs = [(*figure, "paper, A100") for figure in paper.TABLES[number].figures]
    ours = [(_name(row), *(row[name] for name in ("N", "seconds", "fid", "clip_score")), device) for row in rows]
    lines = [as_in_the_paper(*line) for line in (*theirs, *ours)]
    about = f"The paper's Table {number} ({paper.TABLES[number].images}), and the rows above"
    return f"{text}\n{about}\n\n{markdown(lines)}"


def every_number(row: Row) -> dict[str, str]:
    """A row's cells by heading; "–" for what was not measured."""

    def with_error(name: str, error: str, form: str, factor: float = 1) -> str:
        value, deviation = (shown(row[key], form, factor) for key in (name, error))
        return value if row[name] is None else f"{value} ± {deviation}"

    return {
        "model": row["model"],
        "N": shown(row["N"], "d"),
        "α": shown(row["alpha"], "g"),
        "s / image": shown(row["seconds"], ".3f"),
        "S": with_error("S", "S_error", ".4f"),
        "FID": shown(row["fid"], ".2f"),
        "CLIP score": with_error("clip_score", "clip_score_error", ".4f"),
        "KID × 10³": with_error("kid", "kid_deviation", ".2f", 1e3),
        "precision": shown(row["precision"], ".3f"),
        "recall": shown(row["recall"], ".3f"),
        "images": shown(row["made"], "d"),
        "photographs": shown(row["real"], "d"),
    }


def as_in_the_paper(
    model: str, N: int | None, seconds: float | None, fid: float, clip_score: float | None, measured: str
) -> dict[str, str]:
    """A row's cells in the paper's layout, by heading."""
    return {
        "model": model,
        "N": shown(N, "d"),
        "s / image": shown(seconds, ".2f"),
        "FID": shown(fid, ".1f"),
        "CLIP score": shown(clip_score, ".3f"),
        "measured": measured,
    }


def shown(value: float | None, form: str, factor: float = 1) -> str:
    """A number as text, or "–"."""
    return "–" if value is None else format(factor * value, form)


def markdown(lines: Iterable[Mapping[str, str]]) -> str:
    """A Markdown table of lines with the same headings."""
    lines = list(lines)
    return markdown_table(list(lines[0]), (line.values() for line in lines))


def _name(row: Row) -> str:
    return f"{row['model']}, α = {row['alpha']:g}" if row["alpha"] > 1 else row["model"]
