"""Blocks of fields that the configs of several stages share."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"


def pick(variants: Mapping[str, Any], name: str) -> Any:
    """The variant `name` (after the colon in --config=FILE:name). Raises ValueError listing the variants."""
    if name not in variants:
        raise ValueError(f"this config has no variant {name!r}; it has {', '.join(variants)}")
    return variants[name]


def weights() -> ConfigDict:
    """Which weights a stage reads, and how it computes with them."""
    config = ConfigDict()
    config.model = ""  # embedded name, directory or hub id in diffusers layout, or one .safetensors or .ckpt file
    config.base = SD15  # directory or hub id that gives a single file's configs, tokenizer and scheduler
    config.delta = {"custom": "", "origin": SD15, "scale": 1.0}  # adds scale · (custom − origin); "" adds nothing
    config.loras = ""  # FILE=0.8|FILE2=0.5, merged in this order
    config.weights_variant = ""  # "fp16" reads model.fp16.safetensors and so on; "ema" a single file's model_ema
    config.dtype = "float32"  # compute type; or bfloat16
    config.attention = "auto"  # or xla: without cuDNN's, the TPU's and the CPU's own kernels
    config.kernels = "auto"  # or xla, which turns all hand-written kernels off
    config.check = False  # true only makes every check that needs no long computation
    config.verify = True  # compare files with their checksums, where there are any; false saves a reading of large ones
    return config


def solving() -> ConfigDict:
    """`weights`, and how noise becomes latents."""
    config = weights()
    config.dynamics = "auto"  # flow or teacher, if the directory does not say it correctly
    config.solver = "auto"  # teacher: dpm_solver, ddim; flow: euler, heun; auto takes the first
    config.N = 25  # solver steps
    config.alpha = 1.0  # guidance scale; 1 turns guidance off
    config.negative = ""  # negative prompt; needs alpha > 1
    config.height = 0  # pixels; 0 is the size the model was made for
    config.width = 0
    return config


def training() -> ConfigDict:
    """How a network is trained; a stage adds `schedule`, and `eval` if its evaluation draws samples."""
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 64  # global, over all devices
    config.accumulate = 1  # micro-batches per batch
    config.fsdp = 1  # devices that share one copy of the training state
    config.ema_decay = 0.9999
    config.optim = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "clip": 1.0}
    config.loop = {"steps": 1, "log_every": 50, "save_every": 1000, "max_skipped": 10, "profile_steps": (0, 0)}
    config.checkpoints = {"keep_last": 2, "keep_every": 0}
    config.verify = True  # compare a checkpoint's files with their checksums before resuming
    config.resume = "auto"  # or force: continues the run in the workdir with other settings than its own
    config.eval_every = 1000  # steps between evaluations: a grid of samples and a few numbers
    config.tensorboard = True
    config.check = False  # true only makes every check that needs no long computation
    return config


def cosine(config: ConfigDict, *, peak: float, warmup_steps: int, end: float) -> dict[str, Any]:
    """A cosine schedule that ends at the last step, also if `config.loop.steps` changes later."""
    total_steps = config.loop.get_ref("steps")
    return {"name": "cosine", "peak": peak, "warmup_steps": warmup_steps, "total_steps": total_steps, "end": end}
