"""Export: a trained flow in formats that run without this package, with a model card.

    python -m instaflow_jax.main --config=configs/export.py --workdir=DIR
    python -m instaflow_jax.main --config=configs/export.py --workdir=DIR --config.model=DIR/reflow \\
        --config.output=export_flow
    python -m instaflow_jax.main --config=configs/export.py:sd15 --workdir=DIR --config.model=DIR/distill_lpips
    python -m instaflow_jax.main --config=configs/export.py:stacked --workdir=DIR    # a Stacked U-Net
    python -m instaflow_jax.main --config=configs/export.py --workdir=DIR --config.push=OWNER/NAME    # to the Hub

Writes DIR/export, all or nothing:

    orbax/        the weights; orbax-checkpoint restores them in three lines
    diffusers/    for StableDiffusionPipeline.from_pretrained of PyTorch diffusers
    stablehlo/    the program (token ids, noise → images) for cpu, cuda and tpu, and draw.py, which runs it with only
                  jax and numpy
    msgpack/      for the Flax classes of diffusers (up to 0.39), which have no Stacked U-Net
    single_file/  one checkpoint in the original naming, and a graph that draws from it in ComfyUI; no Stacked U-Net
    README.md     the model card, with the code that loads each format

and, where config.formats asks for them (docs/export.md says how; the first two need the extra `onnx`):

    onnx/         the program for ONNX Runtime, with its tokenizer
    web/          a static page that draws in the browser
    lora/         the adapters of a run with config.lora, in the naming of diffusers and of kohya

Needs nothing: a missing flow is distilled first.
"""

from ml_collections import ConfigDict

from configs import common, distill

FORMATS = ("orbax", "diffusers", "stablehlo", "msgpack", "single_file")
VARIANTS = {
    "openmoji": {},
    "stacked": {"formats": FORMATS[:3]},
    "sd15": {"dtype": "bfloat16", "prompts": "a hyper-realistic photo of a cute cat"},
}


def get_config(variant: str = "openmoji") -> ConfigDict:
    config = common.weights()  # .model may also be a run directory; "" is the run that distill makes in WORKDIR
    config.stage = "export"
    config.weights = "ema"  # or params; which weights of a run directory
    config.dynamics = "auto"  # flow or teacher, if a directory in diffusers layout does not state it correctly
    config.formats = FORMATS  # also onnx, web, lora
    config.attention = "xla"  # the exported program runs anywhere, so it has none of a platform's own kernels
    config.convention = "stock"  # of diffusers/; or released: the authors' sign and scheduler, for their own code
    config.single_file_dtype = "float16"  # of the weights in single_file/; or float32
    config.prompts = "woman astronaut|red apple|cat face"  # in stablehlo/ as token ids, in ComfyUI's graph and in web/
    config.onnxruntime_web = ""  # of web/: the folder of the unpacked npm package onnxruntime-web
    config.output = "export"  # folder of the workdir to write to
    config.replace = False  # whether to replace an existing export
    config.push = ""  # OWNER/NAME uploads the export there; one that was made before is only uploaded
    config.push_dry_run = False  # whether only to print what config.push would send
    config.distill = distill.get_config("sd15_l2" if variant == "sd15" else variant)
    config.update(common.pick(VARIANTS, variant))
    return config.lock()
