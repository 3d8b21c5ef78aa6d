"""The model card of an export: how it was made, from what, under which licence, what was measured, how to run it."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from instaflow_jax import pipeline, sampling
from instaflow_jax.stages.export.source import Source, parents, run_config

TABLE = "evaluate/table.md"  # in the workdir, by the stage that measures
_SD15 = "[CreativeML OpenRAIL-M](https://huggingface.co/spaces/CompVis/stable-diffusion-license)"
TEXTS = {  # what a licence's name in a card means
    "cc-by-sa-4.0": "[CC BY-SA 4.0](https://creativecommons.org/licenses/by-sa/4.0/)",
    "creativeml-openrail-m": _SD15,
    "openrail++": "[CreativeML Open RAIL++-M](https://huggingface.co/stabilityai/stable-diffusion-2/blob/main/LICENSE-MODEL)",
    "cc-by-nc-4.0": f"[CC BY-NC 4.0](https://creativecommons.org/licenses/by-nc/4.0/), no commercial use, and {_SD15} of "
    "the Stable Diffusion underneath",
    "other": "as the teacher's, which its files here do not state: look it up before you pass this on",
}
_KNOWN = (  # names of models whose licence is known, most binding first
    (r"(instaflow_0_9b|2_rectified_flow)_from_sd", "cc-by-nc-4.0"),
    (r"stable-diffusion-2", "openrail++"),
    (r"stable-diffusion-(v1|inpainting)", "creativeml-openrail-m"),
)
_OPENMOJI = (
    "All emojis designed by [OpenMoji](https://openmoji.org), the open-source emoji and icon project. "
    "Licence: CC BY-SA 4.0; pictures made with these weights carry it too."
)


@dataclasses.dataclass(frozen=True)
class Licence:
    """A licence as a card names it ("other" where unknown), and the model that it is inherited from."""

    name: str
    source: str


# ---------------------------------------------------------------- licence


def lineage(source: Source) -> list[str]:
    """The models that `source` was made from, nearest first, itself leading, as far as the runs' configs tell."""
    found, queue = [], [source.name, *(parents(source.run) if source.run else [])]
    while queue:
        name = queue.pop(0)
        if name and name not in found:
            found.append(name)
            run = run_config(name)
            queue += parents(run) if run else []
    return found


def licence(source: Source) -> Licence:
    """That of the nearest ancestor whose licence its own card states, or whose name is known."""
    for name in lineage(source):
        found = stated(name) or next((spdx for names, spdx in _KNOWN if re.search(names, name.lower())), None)
        if found:
            return Licence(found, name)
    return Licence("other", lineage(source)[-1])


def stated(name: str) -> str | None:
    """The licence in the front matter of a directory's card, or of its UNet's, or of the export it is a part of."""
    folder = Path(pipeline.locate(name))
    for card in (folder / "README.md", folder / "unet" / "README.md", folder.parent / "README.md"):
        if card.is_file():
            front = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8"), re.DOTALL)
            line = front and re.search(r"^license:\s*(\S+)", front[1], re.MULTILINE)
            if line:
                return line[1]
    return None


# ---------------------------------------------------------------- the card


def card(config: ConfigDict, source: Source, licence: Licence, workdir: Path) -> str:
    """README.md, with the front matter that model hubs read."""
    one_step = isinstance(source.dynamics, sampling.Flow)
    tags = "instaflow, rectified-flow, one-step, jax" if one_step else "stable-diffusion, jax"
    parts = [
        "\n".join(
            [
                "---",
                f"license: {licence.name}",
                "library_name: diffusers",
                "pipeline_tag: text-to-image",
                f"tags: [{tags}]",
                "---",
            ]
        ),
        f"# Text to image in {'one step' if one_step else 'many steps'}",
        "A rectified flow, trained by the recipe of [InstaFlow](https://arxiv.org/abs/2309.06380) with instaflow_jax."
        if one_step
        else "A teacher: a noise predictor, exported as it is.",
        "## Recipe",
        recipe(source, config),
        "## Data",
        data(source),
        "## Licence",
        legal(source, licence),
        "## Measured",
        measured(workdir),
        "## Use",
        *(USES[form](config, source) for form in config.formats),
    ]
    if source.run:
        parts += ["## Resolved config", f"```json\n{json.dumps(source.run, indent=1)}\n```"]
    return "\n\n".join(parts) + "\n"


def recipe(source: Source, config: ConfigDict) -> str:
    """A table of what the run's resolved config says."""
    if not source.run:
        return f"Exported from `{source.name}`, which keeps no record of its training."
    run, rows = source.run, {"Stage": f"{source.run['stage']}, from the weights of `{parents(source.run)[0]}`"}
    if "distance" in run:
        rows["Distance (Eq. 6)"] = run["distance"]
    if "loss" in run:
        rows["Loss (Eq. 5)"] = ", ".join(f"{key} {value}" for key, value in run["loss"].items())
    rows |= {
        "Steps": f"{run['loop']['steps']} planned, batch {run['batch_size']}"
        + (f"; these weights are those of step {source.step}" if source.step is not None else ""),
        "Weights": f"running mean, decay {run['ema_decay']}"
        if source.step is None or config.weights == "ema"
        else "the parameters themselves, not their running mean",
        "Learning rate": f"{run['schedule']['peak']:g}, {run['schedule']['name']}, after {run['schedule']['warmup_steps']} "
        "steps of warm-up",
        "Compute type": run["dtype"],
    }
    return table(rows)


def data(source: Source) -> str:
    """What the pairs were made of and how."""
    if "pairs" not in source.run:
        return "Not known to this export."
    pairs, count = source.run["pairs"], source.run["pairs"]["count"]
    return (
        table(
            {
                "Pairs (noise, text, image)": str(count) if count else "one for each prompt",
                "Prompts": f"`{pairs['prompts']['source']}`",
                "Images by": f"`{pairs['model']}`, {pairs['N']} steps, guidance {pairs['alpha']:g}",
            }
        )
        + "\n\nNo picture made by people was looked at in this training: the images are the model's own."
    )


def table(rows: dict[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())])


def legal(source: Source, licence: Licence) -> str:
    """The licence in words, and the credit that the embedded world owes."""
    text = f"{TEXTS.get(licence.name, licence.name)}, inherited from `{licence.source}`."
    embedded = any(Path(pipeline.locate(name)).parent == pipeline.EMBEDDED for name in lineage(source))
    return text + (f" {_OPENMOJI}" if embedded else "")


def measured(workdir: Path) -> str:
    """The table of the stage that measures, or that there is none."""
    path = workdir / TABLE
    return path.read_text(encoding="utf-8").strip() if path.is_file() else "Not measured."


# ---------------------------------------------------------------- how to run each form


def use_orbax(config: ConfigDict, source: Source) -> str:
    return """`orbax/`: the weights, `params["unet"]["conv_in.kernel"]` and so on, as numpy arrays:

```python
import os
import orbax.checkpoint as ocp
params = ocp.StandardCheckpointer().restore(os.path.abspath("orbax"))
```"""


def use_diffusers(config: ConfigDict, source: Source) -> str:
    if not isinstance(source.dynamics, sampling.Flow):
        call = "num_inference_steps=25"
    elif config.convention == "released":
        return (
            "`diffusers/`: the authors' convention. The UNet predicts X1 − X0, its clock is 1000·(1 − t): for the "
            "released InstaFlow code, and for instaflow_jax. Stock schedulers do not fit it."
        )
    else:
        call = "num_inference_steps=1, guidance_scale=1.0"
    return f"""`diffusers/`: PyTorch, without code of our own:

```python
from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained("diffusers")
pipe("red apple", {call}).images[0].save("apple.png")
```"""


def use_stablehlo(config: ConfigDict, source: Source) -> str:
    return (
        f"`stablehlo/`: `python stablehlo/draw.py` needs jax and numpy alone, draws `{config.prompts}` and writes the "
        "pictures beside itself; it is ten lines to copy from. Other prompts: put their token ids into `ids.npy`. "
        f"For cpu, cuda and tpu, products in {config.dtype}; jax keeps such programs readable for six months or more."
    )


def use_msgpack(config: ConfigDict, source: Source) -> str:
    return """`msgpack/`: the Flax classes of diffusers until 0.39 and transformers 4:

```python
from diffusers import FlaxUNet2DConditionModel
unet, params = FlaxUNet2DConditionModel.from_pretrained("msgpack", subfolder="unet")
```"""


USES = {"orbax": use_orbax, "diffusers": use_diffusers, "stablehlo": use_stablehlo, "msgpack": use_msgpack}
