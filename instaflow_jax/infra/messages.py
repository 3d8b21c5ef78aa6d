"""Parts of the messages that people read: quoted texts and lists of names, both kept short."""

from collections.abc import Sequence


def quote(text: str) -> str:
    """A prompt in quotation marks, at most 80 characters of it."""
    return repr(text if len(text) <= 80 else text[:77] + "...")


def first_ten(names: Sequence[str], separator: str = ", ") -> str:
    """The first ten names, and the number of the rest."""
    return separator.join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
