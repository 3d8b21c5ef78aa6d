"""The model card of an export: its recipe, data, licence and measurements, and how to run each format."""

import json
from pathlib import Path
from typing import Any

from instaflow_jax import sampling
from instaflow_jax.infra.messages import markdown_table
from instaflow_jax.models.stacked_unet import StackedUNet
from instaflow_jax.stages.export import single_file
from instaflow_jax.stages.export.formats import Options
from instaflow_jax.stages.export.licence import Licence, base_model, legal
from instaflow_jax.stages.export.source import Source, flow_steps, keeps_head, parents

TABLE = "evaluate/table.md"  # in the workdir, written by stage `evaluate`
FOLDERS = "Run these lines in this folder. From the Hub, fetch it first: `hf download OWNER/NAME --local-dir FOLDER`."


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
    if keeps_head(source.run or {}):
        tags, title = "stable-diffusion, rectified-diffusion, jax", "few steps"
        summary = "A Stable Diffusion with straight paths, trained with instaflow_jax by rectified diffusion "
        summary += "(arXiv 2410.07303). Its own scheduler (DDIM) draws in one or a few steps."
    front = f"license: {licence.name}\nlibrary_name: diffusers\npipeline_tag: text-to-image\ntags: [{tags}]"
    base = base_model(source)
    front += f"\nbase_model: {base}" if base else ""
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
    if source.adapters:
        lora = run["lora"]
        alpha = lora["rank"] if lora["alpha"] is None else lora["alpha"]
        targets = ", ".join(f"`{pattern}`" for pattern in (*lora["targets"], *lora["ranks"]))
        rows["Trained"] = f"adapters (LoRA) alone: rank {lora['rank']}, alpha {alpha:g}, {targets}"
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


def use_lora(source: Source, options: Options) -> str:
    assert source.adapters
    base = source.adapters.base
    if keeps_head(source.run or {}):
        return f"""`lora/`: the adapters alone, in the naming of diffusers and, `kohya.safetensors`, of kohya's trainer.
They belong to `{base}`, which then draws in one or a few steps of DDIM:

```python
from diffusers import DDIMScheduler, StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained("{base}")
pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True)
pipe.load_lora_weights("lora")
pipe("red apple", num_inference_steps=4, guidance_scale=1.0).images[0].save("apple.png")
```"""
    if options.convention == "released":
        return (
            "`lora/`: the adapters alone, in the naming of diffusers and, `kohya.safetensors`, of kohya's trainer. "
            f"They belong to `{base}`."
        )
    return f"""`lora/`: the adapters alone, in the naming of diffusers and, `kohya.safetensors`, of kohya's trainer.
They belong to `{base}` as a flow in the convention of `diffusers/`, here `BASE`, which
`python -m instaflow_jax.main --config=configs/export.py --config.model={base} --config.dynamics=flow` makes:

```python
from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained("BASE")
pipe.load_lora_weights("lora")
pipe("red apple", num_inference_steps={flow_steps(source)}, guidance_scale=1.0).images[0].save("apple.png")
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


def use_onnx(source: Source, options: Options) -> str:
    shape = ", ".join(map(str, source.pipe.latent_shape))
    return f"""`onnx/`: for ONNX Runtime, any batch size, in float32. Keep `one_step.onnx.data` beside `one_step.onnx`:

```python
import numpy as np
import onnxruntime
from tokenizers import Tokenizer
session = onnxruntime.InferenceSession("onnx/one_step.onnx")
rows = Tokenizer.from_file("onnx/tokenizer.json").encode_batch(["red apple", "cat face"])
noise = np.random.default_rng(0).standard_normal((len(rows), {shape}), np.float32)
images = session.run(None, {{"ids": np.array([row.ids for row in rows], np.int32), "noise": noise}})[0]
```

The images are uint8, [batch, height, width, 3]."""


def use_web(source: Source, options: Options) -> str:
    return (
        "`web/`: a page that draws in the visitor's browser, on WebGPU or else WASM, and loads nothing from elsewhere. "
        "Put the folder on any static host, or look at it here with `python -m http.server --directory web`. The "
        "weights are stored in float16 and computed with in float32. A seed gives the noise of `sample`."
    )


USES = {
    "orbax": use_orbax,
    "diffusers": use_diffusers,
    "stablehlo": use_stablehlo,
    "msgpack": use_msgpack,
    "single_file": use_single_file,
    "lora": use_lora,
    "onnx": use_onnx,
    "web": use_web,
}
