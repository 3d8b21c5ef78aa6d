"""Parts of what people read: quoted texts and lists of names, both kept short, file names, and tables."""

import re
from collections.abc import Iterable, Sequence


def quote(text: str) -> str:
    """A prompt in quotation marks, at most 80 characters of it."""
    return repr(text if len(text) <= 80 else text[:77] + "...")


def slug(prompt: str) -> str:
    """A prompt as a part of a file name, at most 60 characters of it."""
    return re.sub(r"\W+", "-", prompt.lower()).strip("-")[:60]


def first_ten(names: Sequence[str], separator: str = ", ") -> str:
    """The first ten names, and the number of the rest."""
    return separator.join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def markdown_table(head: Sequence[str], rows: Iterable[Iterable[str]], *, numbers: bool = False) -> str:
    """A Markdown table; with `numbers` all columns but the first are aligned to the right."""
    rule = ["---", *(["---:" if numbers else "---"] * (len(head) - 1))]
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, rule, *rows))
