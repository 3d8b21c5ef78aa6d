"""Prompts from OpenMoji's captions, text, JSONL, Parquet or TFDS, cleaned by stated rules, with a count of what was not.

A row that is no prompt (broken encoding, broken JSON, an absent or empty column) is counted, never fatal: web metadata
always has some. Every process reads the whole list, since pair i belongs to prompt i.
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
    """What is done to each row, in this order.

    Attributes:
      normalize: compose Unicode (NFC), and make one space of every run of white space, none at the ends.
      min_chars: shorter prompts are dropped.
      max_chars: longer prompts are dropped; 0 for no limit.
      unique: of equal prompts the first is kept.
    """

    normalize: bool
    min_chars: int
    max_chars: int
    unique: bool


class Prompts(NamedTuple):
    """The prompts kept, and how many rows were read, malformed, too short, too long, repeated and kept."""

    texts: list[str]
    report: dict[str, int]


def load(source: str, *, column: str, split: str, data_dir: str, count: int, seed: int, cleaning: Cleaning) -> Prompts:
    """All prompts of a source, in its order.

    Args:
      source: "openmoji"; a .txt, .jsonl or .parquet file, or a glob of one kind ("laion/*.parquet"), read in the order
        of their names; "tfds:NAME", "tfds:NAME/CONFIG" or "tfds:DIRECTORY" for a set that TFDS has
        prepared as array_record ("tfds:coco_captions/2014").
      column: where the text is, for all but OpenMoji and .txt; dots go down ("captions.text"), and a list of texts
        gives one prompt each.
      split: of a TFDS set.
      data_dir: where TFDS keeps its sets; "" for its default.
      count: captions to draw from OpenMoji; other sources ignore it.
      seed: of that draw.

    Raises:
      ValueError: unknown source, a file that is not what its name says, a column that is nowhere, or nothing left.
      FileNotFoundError: no such file or prepared set.
    """
    if source == "openmoji":
        rows = sources.openmoji(count, seed)
    elif source.startswith("tfds:"):
        rows = sources.tfds_set(source.removeprefix("tfds:"), sources.need_column(source, column), split, data_dir)
    else:
        rows = sources.files(source, column)
    found = clean(rows, cleaning)
    if not found.texts:
        raise ValueError(
            f"prompts.source={source!r} gave no prompt ({describe(found.report)}): "
            "check prompts.column and the limits of length"
        )
    return found


def clean(rows: Iterable[str | None], rules: Cleaning) -> Prompts:
    """Applies the rules and counts what each dropped."""
    counts = Counter({name: 0 for name in ("read", "malformed", "too short", "too long", "repeated", "kept")})
    texts, seen = [], set()
    for row in rows:
        text = " ".join(unicodedata.normalize("NFC", row).split()) if row is not None and rules.normalize else row
        verdict = _verdict(text, rules, seen)
        counts.update(["read", verdict])
        if verdict == "kept":
            texts.append(text)
    return Prompts(texts, dict(counts))


def _verdict(text: str | None, rules: Cleaning, seen: set[bytes]) -> str:
    if text is None or not _encodes(text):
        return "malformed"
    if len(text) < rules.min_chars:
        return "too short"
    if rules.max_chars and len(text) > rules.max_chars:
        return "too long"
    if rules.unique:
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()  # a third of what the texts would take
        if digest in seen:
            return "repeated"
        seen.add(digest)
    return "kept"


def _encodes(text: str) -> bool:
    """JSON may hold half a surrogate pair, which is no character."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


def describe(report: dict[str, int]) -> str:
    """ "120 rows: 3 malformed, 117 kept"; what did not happen is not mentioned."""
    parts = [f"{n:,} {name}" for name, n in report.items() if name != "read" and (n or name == "kept")]
    return f"{report['read']:,} rows: " + ", ".join(parts)


def sha256(texts: Iterable[str]) -> str:
    """Of the list in its order, by which a data set knows the prompts it was made from."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()
