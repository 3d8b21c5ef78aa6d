"""Export: a trained flow in forms that others run without this package, with a model card.

    python -m instaflow_jax.main --config=configs/export.py --workdir=DIR
    python -m instaflow_jax.main --config=configs/export.py --workdir=DIR --config.model=DIR/reflow --config.output=export_flow
    python -m instaflow_jax.main --config=configs/export.py:sd15 --workdir=DIR --config.model=DIR/distill_lpips

Writes DIR/export, whole or not at all:

    orbax/      the weights alone, restored by orbax-checkpoint in three lines
    diffusers/  what PyTorch diffusers' stock StableDiffusionPipeline.from_pretrained runs
    stablehlo/  the program (token ids, noise → pictures) for cpu, cuda and tpu, and draw.py, which runs it with jax and
                numpy alone
    msgpack/    what diffusers' Flax classes (until 0.39) read
    README.md   the model card, with the lines to type for each

Needs nothing: the flow is distilled first where it is absent.
"""

from ml_collections import ConfigDict

from configs import common, distill

FORMATS = ("orbax", "diffusers", "stablehlo", "msgpack")
VARIANTS = {"openmoji": {}, "sd15": {"dtype": "bfloat16", "prompts": "a hyper-realistic photo of a cute cat"}}


def get_config(variant: str = "openmoji") -> ConfigDict:
    config = common.weights()  # .model may be a run directory too; "" is what distill left in WORKDIR
    config.stage = "export"
    config.weights = "ema"  # of a run directory; or params
    config.dynamics = "auto"  # flow or teacher, where a directory in diffusers layout does not say it right
    config.formats = FORMATS
    config.convention = "stock"  # of diffusers/; or released, the authors' sign and scheduler, for their own code
    config.prompts = "woman astronaut|red apple|cat face"  # whose token ids go beside that program
    config.output = "export"  # folder of the workdir to write
    config.replace = False  # puts the new export in the place of one that is there
    config.distill = distill.get_config("sd15_l2" if variant == "sd15" else "openmoji")
    config.update(common.pick(VARIANTS, variant))
    return config.lock()
