"""The table of `evaluate`: which numbers it has, how they are written, and what they mean."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Row = Mapping[str, Any]


class Column(NamedTuple):
    """A number of each row: its key, its heading, how it is written, which way is better, and what it means."""

    key: str
    heading: str
    form: str
    better: str
    meaning: str


COLUMNS = (
    Column(
        "seconds",
        "s / image",
        ".3f",
        "less",
        "Seconds from prompt to picture: text encoder, ODE and decoder as one compiled program, batch 1, the median "
        "of several runs, on the machine named below.",
    ),
    Column(
        "fd_emoji",
        "FD to emoji",
        ".1f",
        "less",
        "Fréchet distance between the row's pictures and all real emoji, in the image features of the embedded CLIP, "
        "a small one that was trained on all emoji and that nothing here is trained against. The paper's FID is the "
        "same formula on photographs and Inception features, so the numbers do not compare, only their order does.",
    ),
    Column(
        "fd_kinds",
        "FD, kinds",
        ".1f",
        "less",
        "The same distance where only the kind of each emoji is prompted (“a person”, “a flag”): one prompt, hundreds "
        "of right answers, between which a regression averages.",
    ),
    Column(
        "fd_teacher",
        "FD to teacher",
        ".1f",
        "less",
        "The first distance, but to the teacher's own 25-step pictures of the same prompts from other noise: what a "
        "student lost of its teacher. The teacher's first row shows how large it is for no loss at all.",
    ),
    Column("fd_latents", "FD of latents", ".2f", "less", "The same, of the latents before they are decoded."),
    Column("clip_score", "CLIP score", ".3f", "more", "Mean cosine between picture and prompt, by the same CLIP."),
    Column(
        "found",
        "found",
        ".1%",
        "more",
        "Share of pictures whose nearest real emoji, by the same CLIP and of all there are, is the prompted one. "
        "A wrong skin tone is forgiven, and so are emoji that are drawn alike.",
    ),
    Column(
        "S",
        "S",
        ".4f",
        "less",
        "Straightness of the model's paths per latent dimension, 0 for straight lines, ± its standard error. It "
        "belongs to the model, so only its first row has it; the teacher is seen as a flow.",
    ),
)
MORE = (
    Column(
        "found_by_name",
        "found by name",
        ".1%",
        "more",
        "Share of pictures whose nearest full name, of all names, is the prompted one.",
    ),
    Column(
        "error_names",
        "error",
        ".3f",
        "less",
        "Mean squared difference of latents, whose variance is about 1, from the teacher's first row, by the same noise: "
        "how well the teacher's own way from noise to picture was learnt. No aim in itself, as a reflow may pair anew.",
    ),
    Column("error_kinds", "error, kinds", ".3f", "less", "The same for kinds."),
    Column("kid", "KID", ".3f", "less", "Kernel distance to all real emoji, unbiased for small sets."),
    Column(
        "precision",
        "precision",
        ".1%",
        "more",
        "Share of pictures that lie among the real pictures of the prompted emoji.",
    ),
    Column(
        "recall",
        "recall",
        ".1%",
        "more",
        "Share of those real pictures that lie among the row's; low where variety is lost.",
    ),
)


def label(row: Row) -> str:
    """ "2-RF, 4 steps"."""
    if not row["N"]:
        return row["title"]
    return f"{row['title']}, {row['N']} step{'s' if row['N'] > 1 else ''}"


def cell(row: Row, column: Column) -> str:
    """The number as it is written; "–" where the row has none."""
    if row.get(column.key) is None:
        return "–"
    text = format(row[column.key], column.form).replace("%", " %")
    return text if column.key != "S" else f"{text} ± {row['S_error']:.4f}"


def markdown(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """A Markdown table, a line a row."""
    lines = [["", *(column.heading for column in columns)], ["---", *("---:" for _ in columns)]]
    lines += [[label(row), *(cell(row, column) for column in columns)] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
