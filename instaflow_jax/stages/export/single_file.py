"""The format `single_file`: one checkpoint in the original naming, and the graph in which ComfyUI draws from it.

ComfyUI's node `ModelSamplingSD3` with shift 1 gives the network the noise as it is and the timestep 1000·σ, and takes
x − σ · output as the image; its Euler sampler then makes exactly the steps of `solvers.euler`. The samplers of a
Stable Diffusion (ComfyUI without that node, AUTOMATIC1111's web UI) divide the noise by √(1 + σ²), give timestep 999,
and subtract σ · output with σ = 14.6: no change of the last convolution makes that X0 + v.
"""

from pathlib import Path
from typing import Any

from instaflow_jax import sampling
from instaflow_jax.infra import files
from instaflow_jax.models.stacked_unet import StackedUNet
from instaflow_jax.stages.common.loading import read_prompts
from instaflow_jax.stages.export.source import Source, flow_steps
from instaflow_jax.weights import ldm
from instaflow_jax.weights.conventions import NUM_TIMESTEPS, as_single_file

CHECKPOINT = "instaflow_jax.safetensors"
GRAPH = "comfyui.json"
# The UNets by which ComfyUI and the web UIs know a Stable Diffusion: (cross_attention_dim, use_linear_projection).
_FAMILIES = {(768, False): "stable-diffusion-v1", (1024, True): "stable-diffusion-v2"}


def write(source: Source, directory: Path, *, dtype: str, licence: str, prompts: str) -> None:
    """The checkpoint; for a flow also the graph, which draws the first of `prompts`."""
    directory.mkdir()
    pipe, params, scheduler = source.pipe, source.pipe.params, source.pipe.scheduler
    if isinstance(source.dynamics, sampling.Flow):
        unet, scheduler, _ = as_single_file(params["unet"], pipe.index, source.dynamics.num_timesteps)
        params = params | {"unet": unet}
        files.write_json(directory / GRAPH, comfyui_graph(source, read_prompts(prompts)[0]), indent=2)
    configs = {name: net.config for name, net in pipe.nets.items()}
    ldm.write(directory / CHECKPOINT, configs, params, scheduler, dtype=dtype, metadata=metadata(source, licence))


def check(source: Source, dtype: str) -> None:
    """ValueError if the model has no place in such a file, or a weight does not fit into `dtype`."""
    if source.pipe.nets["unet"].module is StackedUNet:
        raise ValueError(
            f"{source.name} is a Stacked U-Net, for which the original code has no names: leave 'single_file' out of "
            "config.formats, as configs/export.py:stacked does"
        )
    if isinstance(source.dynamics, sampling.Flow):
        as_single_file({}, source.pipe.index, source.dynamics.num_timesteps)
    named = source.pipe.params.items()
    try:
        ldm.check_range({f"{net}/{name}": array for net, params in named for name, array in params.items()}, dtype)
    except ValueError as error:
        raise ValueError(f"{source.name}: {error}; use config.single_file_dtype='float32'") from error


def family(source: Source) -> str:
    """ModelSpec's name of the Stable Diffusion whose layout the model has; "" if it has other widths than any."""
    unet = source.pipe.nets["unet"].config
    widths = _FAMILIES.get((unet.cross_attention_dim, unet.use_linear_projection), "")
    return widths if unet.block_out_channels == (320, 640, 1280, 1280) else ""


def metadata(source: Source, licence: str) -> dict[str, str]:
    """The keys of Stability AI's ModelSpec 1.0.0, but for the prediction type, which `ldm.write` states.

    A flow has an architecture of its own: the specification asks for one wherever programs must act differently.
    """
    height, width = source.pipe.image_size(source.pipe.latent_shape)
    fields = {
        "sai_model_spec": "1.0.0",
        "architecture": family(source) or "latent-diffusion",
        "implementation": "https://github.com/CompVis/stable-diffusion",
        "title": f"{Path(source.name).name}, by instaflow_jax",
        "description": "A noise predictor, unchanged.",
        "license": licence,
        "resolution": f"{width}x{height}",
    }
    if isinstance(source.dynamics, sampling.Flow):
        N = flow_steps(source)
        fields["architecture"] += "-rectified-flow"
        fields["description"] = (
            f"A rectified flow (InstaFlow) that draws in {'one step' if N == 1 else f'{N} steps'}. The UNet predicts "
            f"noise − image; the timestep of noise is {NUM_TIMESTEPS}."
        )
        fields["usage_hint"] = f"ComfyUI: ModelSamplingSD3 with shift 1; steps {N}, euler, simple, cfg 1"
        fields |= {"timestep_range": f"{NUM_TIMESTEPS},{NUM_TIMESTEPS}"} if N == 1 else {}
    return {f"modelspec.{name}": value for name, value in fields.items()}


def comfyui_graph(source: Source, prompt: str) -> dict[str, Any]:
    """A graph in ComfyUI's API format, which its page opens too; [node, output] connects two nodes."""
    height, width = source.pipe.image_size(source.pipe.latent_shape)
    noise = {"seed": 0, "denoise": 1.0, "latent_image": ["empty", 0]}
    solver = {"steps": flow_steps(source), "sampler_name": "euler", "scheduler": "simple"}
    guidance = {"positive": ["prompt", 0], "negative": ["null", 0], "cfg": 1.0}  # at 1, "negative" is not computed
    nodes = {
        "checkpoint": ("CheckpointLoaderSimple", {"ckpt_name": CHECKPOINT}),
        "flow": ("ModelSamplingSD3", {"model": ["checkpoint", 0], "shift": 1.0}),
        "prompt": ("CLIPTextEncode", {"clip": ["checkpoint", 1], "text": prompt}),
        "null": ("CLIPTextEncode", {"clip": ["checkpoint", 1], "text": ""}),
        "empty": ("EmptyLatentImage", {"width": width, "height": height, "batch_size": 1}),
        "sampler": ("KSampler", {"model": ["flow", 0], **noise, **solver, **guidance}),
        "image": ("VAEDecode", {"samples": ["sampler", 0], "vae": ["checkpoint", 2]}),
        "save": ("SaveImage", {"images": ["image", 0], "filename_prefix": "instaflow"}),
    }
    numbers = {name: str(number) for number, name in enumerate(nodes, 1)}

    def numbered(value: Any) -> Any:
        return [numbers[value[0]], value[1]] if isinstance(value, list) else value

    return {
        numbers[name]: {"class_type": kind, "inputs": {key: numbered(value) for key, value in inputs.items()}}
        for name, (kind, inputs) in nodes.items()
    }
