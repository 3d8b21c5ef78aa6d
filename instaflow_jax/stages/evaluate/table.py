"""The table of `evaluate`: its columns, what they mean, and how they are written."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from instaflow_jax.infra.messages import markdown_table

Row = Mapping[str, Any]


class Column(NamedTuple):
    """One number of each row: its key, heading, format, the better direction ("less" or "more"), and meaning."""

    key: str
    heading: str
    form: str
    better: str
    meaning: str


COLUMNS = (
    Column(
        *("seconds", "s / image", ".3f", "less"),
        "Seconds from prompt to image: text encoder, ODE and decoder in one compiled program, batch 1, the median of "
        "several runs on the machine named below.",
    ),
    Column(
        *("fd_emoji", "FD to emoji", ".1f", "less"),
        "Fréchet distance between the row's images and all real emoji, in the image features of the embedded CLIP: a "
        "small one, trained on all emoji; no model here is trained against it. The paper's FID is the same formula on "
        "photographs and Inception features, so only the order of the numbers compares, not their size.",
    ),
    Column(
        *("fd_kinds", "FD, kinds", ".1f", "less"),
        "The same distance when the prompt is only the emoji's kind (“a person”, “a flag”): one prompt with hundreds "
        "of right answers, between which a regression averages.",
    ),
    Column(
        *("fd_teacher", "FD to teacher", ".1f", "less"),
        "Like FD to emoji, but to the teacher's own images of the same prompts from other noise: what a student lost "
        "of its teacher. The teacher's first row shows the distance without any loss.",
    ),
    Column("fd_latents", "FD of latents", ".2f", "less", "The same for the latents before decoding."),
    Column("clip_score", "CLIP score", ".3f", "more", "Mean cosine of image and prompt, by the same CLIP."),
    Column(
        *("found", "found", ".1%", "more"),
        "Share of images whose nearest real emoji, by the same CLIP and among all emoji, is the prompted one. Skin "
        "tones and emoji with the same image are not distinguished.",
    ),
    Column(
        *("S", "S", ".4f", "less"),
        "Straightness of the model's paths per latent dimension, 0 for straight lines, ± its standard error. It "
        "belongs to the model, so only the model's first row has it. The teacher is seen as a flow.",
    ),
)
MORE = (
    Column(
        *("found_by_name", "found by name", ".1%", "more"),
        "Share of images whose nearest full name, among all names, is the prompted one.",
    ),
    Column(
        *("error_names", "error", ".3f", "less"),
        "Mean squared difference between the latents (of variance about 1) and those of the teacher's first row from "
        "the same noise: how well the model learned the teacher's map from noise to image. Not a goal in itself, "
        "because reflow may change the map.",
    ),
    Column("error_kinds", "error, kinds", ".3f", "less", "The same for kinds."),
    Column(
        *("diversity", "diversity", ".3f", "more"),
        "Mean cosine distance, by the same CLIP, between images of the same kind from different noise: low where a "
        "model draws the same image again and again. It should be the teacher's, not more.",
    ),
    Column(
        *("fd_trunk", "FD, trunk", ".2f", "less"),
        "Fréchet distance to all real emoji in the features of a second judge, the trunk of the embedded LPIPS, which "
        "was trained to name emoji and shares nothing with CLIP. Training by LPIPS sees it.",
    ),
    Column("fd_trunk_kinds", "FD, trunk, kinds", ".2f", "less", "The same for kinds."),
    Column("kid", "KID", ".3f", "less", "Kernel distance to all real emoji, unbiased for small sets."),
    Column(
        *("precision", "precision", ".1%", "more"),
        "Share of images that lie among the real images of the prompted emoji.",
    ),
    Column(
        *("recall", "recall", ".1%", "more"),
        "Share of those real images that lie among the row's images; low where variety is lost.",
    ),
)


def label(row: Row) -> str:
    """The row's first cell, such as "2-RF, 4 steps"."""
    if not row["N"]:
        return row["title"]
    return f"{row['title']}, {row['N']} step{'s' if row['N'] > 1 else ''}"


def cell(row: Row, column: Column) -> str:
    """The number as text, or "–" if the row has none."""
    if row.get(column.key) is None:
        return "–"
    text = format(row[column.key], column.form).replace("%", " %")
    return text if column.key != "S" else f"{text} ± {row['S_error']:.4f}"


def markdown(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """A Markdown table with one line per row."""
    lines = ([label(row), *(cell(row, column) for column in columns)] for row in rows)
    return markdown_table(["", *(column.heading for column in columns)], lines, numbers=True)


def page(rows: Sequence[Row], conditions: str) -> str:
    """Both tables, the meaning of their columns, and the paragraph `conditions`."""
    tables = "\n".join(markdown(rows, columns) for columns in (COLUMNS, MORE))
    meanings = "".join(f"* **{c.heading}**, {c.better} is better. {c.meaning}\n" for c in (*COLUMNS, *MORE))
    return f"{tables}\n{meanings}\n{conditions}\n"
