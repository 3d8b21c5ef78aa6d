"""Captions of an emoji at several levels of detail, so that one prompt has many right answers.

"woman astronaut dark skin tone" fits one image, "astronaut" eighteen (every tone and gender), "a person" hundreds. This
ambiguity is why straightening the flow matters: a velocity averaged over eighteen astronauts points at none of them.
"""

import re
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from instaflow_jax.data.openmoji.groups import SUBGROUPS

LEVELS = ("full", "toneless", "base", "subgroup", "kind", "empty")
# Probabilities of the levels among captions that are not empty.
WEIGHTS = {"full": 0.60, "toneless": 0.10, "base": 0.16, "subgroup": 0.08, "kind": 0.06}
# With more captions that have many right images.
KINDS_WEIGHTS = {"full": 0.40, "toneless": 0.05, "base": 0.15, "subgroup": 0.15, "kind": 0.25}

_TONE = re.compile(r" ?\b(light|medium-light|medium|medium-dark|dark) skin tone\b")
_ADULT = re.compile(r"\b(man|woman|men|women)\b(?!')")
_COUPLE = re.compile(r"^(family|kiss|couple with heart)((?: (?:man|woman|boy|girl|person|adult|child))+)$")
# (gender, base) of names where replacing the gendered word by "person" does not give the neutral emoji's name.
_IRREGULAR = {
    "boy": ("man", "child"),
    "girl": ("woman", "child"),
    "old man": ("man", "older person"),
    "old woman": ("woman", "older person"),
    "merman": ("man", "merperson"),
    "mermaid": ("woman", "merperson"),
    "prince": ("man", "person with crown"),
    "princess": ("woman", "person with crown"),
    "woman and man holding hands": ("woman and man", "people holding hands"),
}


class Emoji(NamedTuple):
    """The words of one image. `skin_tone` and `gender` are "" if the name has none; see `parse` for an example."""

    hexcode: str
    name: str
    group: str
    subgroup: str
    skin_tone: str
    gender: str
    base: str


def clean(name: str) -> str:
    """Lower-case ASCII words: "Côte d’Ivoire" -> "cote d'ivoire", "Antigua & Barbuda" -> "antigua and barbuda"."""
    name = name.strip(":").replace("_", " ").replace("’", "'").replace("&", "and").lower()
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return " ".join(re.sub(r"[.,:()!]", "", ascii_name).split())


def split_tone(name: str) -> tuple[str, str]:
    """("man dark skin tone red hair") -> ("man red hair", "dark"); two people of two tones give "dark and light"."""
    tones = _TONE.findall(name)
    toneless = " ".join(_TONE.sub("", name).split())
    return re.sub(" person person$", "", toneless), " and ".join(tones)


def split_gender(toneless: str, names: Collection[str]) -> tuple[str, str]:
    """(gender, base): "woman astronaut" -> ("woman", "astronaut"), "men wrestling" -> ("men", "people wrestling").

    Args:
      toneless: a clean name without skin tone.
      names: all clean names; if they contain the genderless emoji, its name is the base.
    """
    if toneless in _IRREGULAR:
        return _IRREGULAR[toneless]
    if couple := _COUPLE.match(toneless):
        return " and ".join(_ADULT.findall(couple[2])), couple[1]
    found = _ADULT.search(toneless)
    if found is None or (toneless.endswith("holding hands") and " and " in toneless):
        return "", toneless
    neutral = _ADULT.sub("person" if found[1] in ("man", "woman") else "people", toneless)
    without = neutral.removeprefix("person ").removeprefix("people ")
    return found[1], without if without in names else neutral


def parse(hexcode: str, name: str, subgroup: str, names: Collection[str]) -> Emoji:
    """Splits a name into its parts.

    Args:
      hexcode: code points, "1F469-1F3FF-200D-1F680".
      name: the name in the `emoji` package, ":woman_astronaut_dark_skin_tone:".
      subgroup: a key of `SUBGROUPS`, "person-role".
      names: all clean names without tone (see `split_gender`).

    Returns:
      Emoji(hexcode, "woman astronaut dark skin tone", "people-body", "person-role", "dark", "woman", "astronaut").
    """
    toneless, tone = split_tone(clean(name))
    if subgroup in ("country-flag", "subdivision-flag"):
        toneless = f"flag of {toneless}"
    gender, base = split_gender(toneless, names) if SUBGROUPS[subgroup].group == "people-body" else ("", toneless)
    full = f"{toneless} {tone} skin tone" if tone else toneless
    return Emoji(hexcode, full, SUBGROUPS[subgroup].group, subgroup, tone, gender, base)


def captions(emoji: Emoji) -> dict[str, str]:
    """The captions at all `LEVELS`, most exact first; adjacent levels may be equal ("red apple" has no tone)."""
    row = SUBGROUPS[emoji.subgroup]
    toneless = emoji.name.removesuffix(f" {emoji.skin_tone} skin tone")
    return dict(zip(LEVELS, (emoji.name, toneless, emoji.base, row.phrase, row.kind, ""), strict=True))


def level_probabilities(empty: float = 0.1, weights: Mapping[str, float] = WEIGHTS) -> np.ndarray:
    """Probabilities of `LEVELS`: `empty` for the empty caption (classifier-free guidance), the rest by `weights`.

    Raises:
      ValueError: `empty` is outside [0, 1].
    """
    if not 0 <= empty <= 1:
        raise ValueError(f"empty={empty} must be a probability in [0, 1]; use 0.1, the usual value for guidance")
    share = np.array([weights[level] for level in LEVELS[:-1]])
    return np.append((1 - empty) * share / share.sum(), empty)


def draw(emoji: Emoji, seed: int, index: int, empty: float = 0.1, weights: Mapping[str, float] = WEIGHTS) -> str:
    """One caption at a random level, determined by (seed, index)."""
    level = np.random.default_rng([seed, index]).choice(LEVELS, p=level_probabilities(empty, weights))
    return captions(emoji)[str(level)]


def caption_table(emoji: Sequence[Emoji]) -> tuple[list[str], Int[np.ndarray, "N L"]]:
    """All distinct captions, sorted, and for each emoji the index of its caption at each of the L = 6 `LEVELS`.

    Encode the list once; a training step then draws a level from `level_probabilities` and looks up the row.
    """
    rows = [list(captions(e).values()) for e in emoji]
    texts = sorted({text for row in rows for text in row})
    index = {text: i for i, text in enumerate(texts)}
    return texts, np.array([[index[text] for text in row] for row in rows], np.int32)
