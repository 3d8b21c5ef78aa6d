"""The licence of an export: inherited from the models that it was made from, as far as the runs' configs show."""

import dataclasses
import re
from pathlib import Path

from instaflow_jax import pipeline
from instaflow_jax.stages.export.source import Source, parents, run_config
from instaflow_jax.weights import hub

_SD15 = "[CreativeML OpenRAIL-M](https://huggingface.co/spaces/CompVis/stable-diffusion-license)"
TEXTS = {  # by the licence's name in a card's front matter
    "cc-by-sa-4.0": "[CC BY-SA 4.0](https://creativecommons.org/licenses/by-sa/4.0/)",
    "creativeml-openrail-m": _SD15,
    "openrail++": "[CreativeML Open RAIL++-M]"
    "(https://huggingface.co/stabilityai/stable-diffusion-2/blob/main/LICENSE-MODEL)",
    "cc-by-nc-4.0": "[CC BY-NC 4.0](https://creativecommons.org/licenses/by-nc/4.0/), no commercial use, and "
    f"{_SD15} of the underlying Stable Diffusion",
    "other": "the teacher's licence, which its files do not state: look it up before you pass this model on",
}
_KNOWN = (  # (pattern of a model's name, its licence), the most restrictive first
    (r"(instaflow_0_9b|2_rectified_flow)_from_sd", "cc-by-nc-4.0"),
    (r"stable-diffusion-2", "openrail++"),
    (r"stable-diffusion-(v1|inpainting)", "creativeml-openrail-m"),
)
_OPENMOJI = (
    "All emojis designed by [OpenMoji](https://openmoji.org), the open-source emoji and icon project. "
    "Licence: CC BY-SA 4.0. It covers images made with these weights too."
)


@dataclasses.dataclass(frozen=True)
class Licence:
    """A licence by its name in a card's front matter ("other" if unknown), and the model that states it."""

    name: str
    source: str


def lineage(source: Source) -> list[str]:
    """The models that `source` was made from, itself first, then the nearest, as far as the runs' configs show."""
    found, queue = [], [source.name, *(parents(source.run) if source.run else [])]
    while queue:
        name = queue.pop(0)
        if name and name not in found:
            found.append(name)
            run = run_config(name)
            queue += parents(run) if run else []
    return found


def base_model(source: Source) -> str:
    """The hub id that the lineage begins with; "" if it begins with an embedded model or a directory."""
    first = lineage(source)[-1]
    return first if hub.is_id(first) and not Path(first).exists() else ""


def licence(source: Source) -> Licence:
    """The licence of the nearest ancestor whose card states one, or whose name is known."""
    for name in lineage(source):
        found = stated(name) or next((spdx for names, spdx in _KNOWN if re.search(names, name.lower())), None)
        if found:
            return Licence(found, name)
    return Licence("other", lineage(source)[-1])


def stated(name: str) -> str | None:
    """The licence in the front matter of a directory's card, of its UNet's card, or of the export that contains it."""
    folder = Path(pipeline.locate(name))
    for card in (folder / "README.md", folder / "unet" / "README.md", folder.parent / "README.md"):
        if card.is_file():
            front = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8"), re.DOTALL)
            line = front and re.search(r"^license:\s*(\S+)", front[1], re.MULTILINE)
            if line:
                return line[1]
    return None


def legal(source: Source, licence: Licence) -> str:
    """The licence in words, where it comes from, and the attribution that OpenMoji's licence requires; Markdown."""
    return f"{TEXTS.get(licence.name, licence.name)}, inherited from `{licence.source}`.{attribution(source)}"


def attribution(source: Source) -> str:
    """ " " and OpenMoji's attribution if the embedded models are among those that `source` was made from, else ""."""
    embedded = any(Path(pipeline.locate(name)).parent == pipeline.EMBEDDED for name in lineage(source))
    return f" {_OPENMOJI}" if embedded else ""
