"""The model card of an export: its recipe, data, licence and measurements, and how to run each format."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from instaflow_jax import pipeline, sampling
from instaflow_jax.infra.messages import markdown_table
from instaflow_jax.models.stacked_unet import StackedUNet
from instaflow_jax.stages.export import single_file
from instaflow_jax.stages.export.formats import Options
from instaflow_jax.stages.export.source import Source, flow_steps, parents, run_config
from instaflow_jax.weights import hub

TABLE = "evaluate/table.md"  # in the workdir, written by stage `evaluate`
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
FOLDERS = "Run these lines in this folder. From the Hub, fetch it first: `hf download OWNER/NAME --local-dir FOLDER`."
_OPENMOJI = (
    "All emojis designed by [OpenMoji](https://openmoji.org), the open-source emoji and icon project. "
    "Licence: CC BY-SA 4.0. It covers images made with these weights too."
)


@dataclasses.dataclass(frozen=True)
class Licence:
    """A licence by its name in a card's front matter ("other" if unknown), and the model that states it."""

    name: str
    source: str


# ---------------------------------------------------------------- licence


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


# ---------------------------------------------------------------- the card


def card(source: Source, licence: Licence, options: Options, workdir: Path) -> str:
    """README.md, with the front matter that model hubs read."""
    if isinstance(source.dynamics, sampling.Flow):
        N = flow_steps(source)
        title = "one step" if N == 1 else f"{N} steps"
        tags = f"instaflow, rectified-flow, {'one-step, ' if N == 1 else ''}jax"
        summary = "A rectified flow, trained with instaflow_jax, an implementation of "
        summary += "[InstaFlow](https://arxiv.org/abs/2309.06380)."
    else:
        tags, title = "stable-diffusion, jax", "many steps"
        summary = "A teacher (a noise predictor), unchanged."
    front = f"license: {licence.name}\nlibrary_name: diffusers\npipeline_tag: text-to-image\ntags: [{tags}]"
    front += f"\nbase_model: {base_model(source)}" if base_model(source) else ""
    parts = [f"---\n{front}\n---", f"# Text to image in {title}", summary]
    parts += ["## Recipe", recipe(source), "## Data", data(source), "## Licence", legal(source, licence)]
    parts += ["## Measured", measured(workdir), "## Use", FOLDERS]
    parts += [USES[name](source, options) for name in options.formats]
    if source.run:
        parts += ["## Resolved config", f"```json\n{json.dumps(source.run, indent=1)}\n```"]
    return "\n\n".join(parts) + "\n"


def recipe(source: Source) -> str:
    """A table of what the run's resolved config says."""
    if not source.run:
        return f"Exported from `{source.name}`, which has no record of its training."
    run, rows = source.run, {"Stage": f"{source.run['stage']}, from the weights of `{parents(source.run)[0]}`"}
    if source.pipe.nets["unet"].module is StackedUNet:
        rows["Network"] = "Stacked U-Net: two U-Nets in series, as in InstaFlow-1.7B"
    if "distance" in run:
        rows["Distance (Eq. 6)"] = run["distance"]
    if "loss" in run:
        rows["Loss (Eq. 5)"] = ", ".join(f"{key} {value}" for key, value in run["loss"].items())
    steps, schedule = f"{run['loop']['steps']} planned, batch size {run['batch_size']}", run["schedule"]
    is_ema = source.step is None or source.weights == "ema"
    name = schedule.get("name") or schedule["kind"]  # "kind" in version 0.1
    rows |= {
        "Steps": steps if source.step is None else f"{steps}; these are the weights of step {source.step}",
        "Weights": f"exponential moving average, decay {run['ema_decay']}" if is_ema else "parameters, not averaged",
        "Learning rate": f"{schedule['peak']:g}, {name}, after {schedule['warmup_steps']} steps of warm-up",
        "Compute type": run["dtype"],
    }
    return table(rows)


def data(source: Source) -> str:
    """What the pairs were made from and how."""
    if "pairs" not in source.run:
        return "Not recorded."
    pairs, count = source.run["pairs"], source.run["pairs"]["count"]
    rows = {
        "Pairs (noise, text, image)": count or "one for each prompt",
        "Prompts": f"`{pairs['prompts']['source']}`",
        "Images by": f"`{pairs['model']}`, {pairs['N']} steps, guidance {pairs['alpha']:g}",
    }
    return table(rows) + "\n\nThis training used no images made by people: a model generated all of them."


def table(rows: dict[str, Any]) -> str:
    return markdown_table(["", ""], ((key, str(value)) for key, value in rows.items())).rstrip("\n")


def legal(source: Source, licence: Licence) -> str:
    """The licence in words, and the attribution that OpenMoji's licence requires."""
    text = f"{TEXTS.get(licence.name, licence.name)}, inherited from `{licence.source}`."
    embedded = any(Path(pipeline.locate(name)).parent == pipeline.EMBEDDED for name in lineage(source))
    return f"{text} {_OPENMOJI}" if embedded else text


def measured(workdir: Path) -> str:
    """The table that stage `evaluate` wrote, or a note that there is none."""
    path = workdir / TABLE
    return path.read_text(encoding="utf-8").strip() if path.is_file() else "Not measured."


# ---------------------------------------------------------------- how to run each format


def use_orbax(source: Source, options: Options) -> str:
    name = next(name for name in source.pipe.params["unet"] if name.endswith("conv_in.kernel"))
    return f"""`orbax/`: the weights as numpy arrays, for example `params["unet"]["{name}"]`:

```python
import os
import orbax.checkpoint as ocp
params = ocp.StandardCheckpointer().restore(os.path.abspath("orbax"))
```"""


def use_diffusers(source: Source, options: Options) -> str:
    is_flow = isinstance(source.dynamics, sampling.Flow)
    if is_flow and options.convention == "released":
        return (
            "`diffusers/`: the convention of the authors' released checkpoints. The UNet predicts X1 − X0 and its "
            "timestep is 1000·(1 − t). Use it with the released InstaFlow code or with instaflow_jax; the schedulers "
            "of diffusers do not fit it."
        )
    call = f"num_inference_steps={flow_steps(source)}, guidance_scale=1.0" if is_flow else "num_inference_steps=25"
    code, trust = source.pipe.nets["unet"].module.torch_code, ""
    if code:
        trust = ", trust_remote_code=True"
    return f"""`diffusers/`: PyTorch diffusers, {f"with the class in `unet/{code.name}`" if code else "no custom code"}:

```python
from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained("diffusers"{trust})
pipe("red apple", {call}).images[0].save("apple.png")
```"""


def use_stablehlo(source: Source, options: Options) -> str:
    return (
        "`stablehlo/`: a program for cpu, cuda and tpu. `python stablehlo/draw.py` runs it with only jax and numpy. It "
        f"generates `{options.prompts}` and writes the images into the same folder. For other prompts, write their "
        f"token ids to `ids.npy`. The compute type is {options.dtype}. jax guarantees to read such "
        "programs for at least six months."
    )


def use_msgpack(source: Source, options: Options) -> str:
    return """`msgpack/`: for the Flax classes of diffusers (up to 0.39) and transformers 4:

```python
from diffusers import FlaxUNet2DConditionModel
unet, params = FlaxUNet2DConditionModel.from_pretrained("msgpack", subfolder="unet")
```"""


COMFYUI = """In ComfyUI, put it into `models/checkpoints` and open `{graph}`, or set up:

| node | settings |
|---|---|
| Load Checkpoint → ModelSamplingSD3 | shift 1.0; the model goes through this node |
| KSampler | steps {N}, cfg 1.0, sampler euler, scheduler simple, denoise 1.0 |

Without ModelSamplingSD3 it draws noise, and so does AUTOMATIC1111's web UI, whose samplers for SD 1.x and 2.x know only
ε and v."""
NOT_COMFYUI = (
    "ComfyUI and the web UIs do not load it: they know a model by the widths of SD 1.x's or 2.x's UNet, and this one "
    "has others. diffusers and instaflow_jax do."
)


def use_single_file(source: Source, options: Options) -> str:
    N, is_flow = flow_steps(source), isinstance(source.dynamics, sampling.Flow)
    text = f"`single_file/`: `{single_file.CHECKPOINT}`, {options.single_file_dtype}, in the original naming. "
    if not is_flow:
        return text + "ComfyUI and the web UIs load it as they load any Stable Diffusion."
    text += COMFYUI.format(graph=single_file.GRAPH, N=N) if single_file.family(source) else NOT_COMFYUI
    if N > 1:
        return f"{text}\n\nFor diffusers use `diffusers/`, whose scheduler takes {N} steps."
    return f"""{text}

In PyTorch diffusers, with `diffusers/` or the directory of the Stable Diffusion it was trained from as `config`:

```python
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
flow = {{"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 1e6, "num_train_timesteps": 1001}}
pipe = StableDiffusionPipeline.from_single_file(
    "single_file/{single_file.CHECKPOINT}", config="diffusers",
    scheduler=DPMSolverMultistepScheduler(solver_order=1, steps_offset=1, **flow),
)
pipe("red apple", num_inference_steps=1, guidance_scale=1.0).images[0].save("apple.png")
```"""


USES = {"orbax": use_orbax, "diffusers": use_diffusers, "stablehlo": use_stablehlo, "msgpack": use_msgpack}
USES["single_file"] = use_single_file
