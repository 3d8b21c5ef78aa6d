"""Prompts from OpenMoji's captions, text, JSONL, Parquet or TFDS, cleaned by explicit rules that count what they drop.

Rows that are not prompts (broken encoding, broken JSON, an absent or empty column) are counted but are not errors: web
metadata always has some. Every process reads all prompts, since pair i belongs to prompt i.
"""

import dataclasses
import hashlib
import unicodedata
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from instaflow_jax.data import prompt_sources as sources


@dataclasses.dataclass(frozen=True)
class Cleaning:
    """Cleaning rules, applied to each row in this order.

    Attributes:
      normalize: compose Unicode (NFC), collapse every run of white space to one space, and strip the ends.
      min_chars: shorter prompts are dropped.
      max_chars: longer prompts are dropped; 0 means no limit.
      unique: drop repeated prompts and keep the first.
    """

    normalize: bool
    min_chars: int
    max_chars: int
    unique: bool


class Prompts(NamedTuple):
    """The prompts, and how many rows were read, malformed, too short, too long, repeated and kept."""

    texts: list[str]
    report: dict[str, int]


def load(source: str, *, column: str, split: str, data_dir: str, count: int, seed: int, cleaning: Cleaning) -> Prompts:
    """All prompts of a source, in its order.

    Args:
      source: "openmoji" or "openmoji_kinds"; a .txt, .jsonl or .parquet file, or a glob of such files
        ("laion/*.parquet"), read in alphabetical order; "tfds:NAME", "tfds:NAME/CONFIG" or "tfds:DIRECTORY" for a set
        that TFDS has prepared as array_record ("tfds:coco_captions/2014").
      column: name of the column with the text; unused for OpenMoji and .txt. Dots select nested fields
        ("captions.text"), and a list of texts gives one prompt each.
      split: TFDS split.
      data_dir: where TFDS keeps its sets; "" means its default.
      count: number of captions to draw from OpenMoji; other sources ignore it.
      seed: seed of that draw.

    Raises:
      ValueError: unknown source, wrong file format, a missing column, or no prompt left.
      FileNotFoundError: no such file or prepared set.
    """
    if source in sources.OPENMOJI:
        rows = sources.openmoji(source, count, seed)
    elif source.startswith("tfds:"):
        rows = sources.tfds_set(source.removeprefix("tfds:"), sources.need_column(source, column), split, data_dir)
    else:
        rows = sources.files(source, column)
    found = clean(rows, cleaning)
    if not found.texts:
        raise ValueError(
            f"prompts.source={source!r} gave no prompt ({describe(found.report)}); "
            "check prompts.column and prompts.cleaning"
        )
    return found


def clean(rows: Iterable[str | None], rules: Cleaning) -> Prompts:
    """Applies the rules and counts what each one drops."""
    counts = Counter(dict.fromkeys(("read", "malformed", "too short", "too long", "repeated", "kept"), 0))
    texts, seen = [], set()
    for row in rows:
        text = normalize(row) if row is not None and rules.normalize else row
        verdict = _verdict(text, rules, seen)
        counts.update(["read", verdict])
        if verdict == "kept":
            texts.append(text)
    return Prompts(texts, dict(counts))


def normalize(text: str) -> str:
    """Composed Unicode (NFC) with single spaces between words and none at the ends."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def _verdict(text: str | None, rules: Cleaning, seen: set[bytes]) -> str:
    if text is None or not encodes(text):
        return "malformed"
    if len(text) < rules.min_chars:
        return "too short"
    if rules.max_chars and len(text) > rules.max_chars:
        return "too long"
    if rules.unique:
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()  # a third of the texts' memory
        if digest in seen:
            return "repeated"
        seen.add(digest)
    return "kept"


def encodes(text: str) -> bool:
    """False for half a surrogate pair, which JSON may contain but UTF-8 cannot encode."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


def describe(report: dict[str, int]) -> str:
    """A report as text, "120 rows: 3 malformed, 117 kept"; counts of zero are left out."""
    parts = [f"{n:,} {name}" for name, n in report.items() if name != "read" and (n or name == "kept")]
    return f"{report['read']:,} rows: " + ", ".join(parts)


def sha256(texts: Iterable[str]) -> str:
    """SHA-256 of an ordered list of prompts; a set of pairs records it to identify its prompts."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()
