"""Images from prompts, by a teacher or a flow in diffusers layout.

    python -m instaflow_jax.main --config=configs/sample.py --config.prompts='red apple|cat face'
    python -m instaflow_jax.main --config=configs/sample.py:instaflow --config.prompts=prompts.txt
    python -m instaflow_jax.main --config=configs/sample.py:sd15 --config.model=DIR_OR_HUB_ID
    python -m instaflow_jax.main --config=configs/sample.py:sd15 --config.model=FILE.safetensors \\
        --config.base=DIR_OR_HUB_ID
    python -m instaflow_jax.main --config=configs/sample.py:instaflow --config.delta.custom=DIR \\
        --config.loras='FILE=0.8|FILE2=0.5'
    python -m instaflow_jax.main --config=configs/sample.py:instaflow --config.controls='DIR=0.8|FILE.safetensors' \\
        --config.conditions='edges.png|pose.png'

Variants: openmoji (embedded, the default; runs on a laptop), sd15, sd21, rf2 (the released 2-rectified flow) and
instaflow (the released one-step model). Writes WORKDIR/sample/*.png, each with its prompt, seed and settings in its
metadata, and grid.png with one row per prompt and one column per seed.
"""

from ml_collections import ConfigDict

from configs import common

SD21 = "stabilityai/stable-diffusion-2-1"
VARIANTS = {
    "openmoji": {"model": "openmoji", "N": 25, "alpha": 2.0},
    "sd15": {"model": common.SD15, "N": 25, "alpha": 7.5},
    "sd21": {"model": SD21, "base": SD21, "N": 25, "alpha": 7.5},
    "rf2": {"model": "XCLiu/2_rectified_flow_from_sd_1_5", "dynamics": "flow", "N": 25, "alpha": 1.5},
    "instaflow": {"model": "XCLiu/instaflow_0_9B_from_sd_1_5", "dynamics": "flow", "N": 1, "alpha": 1.0},
}


def get_config(variant: str = "openmoji") -> ConfigDict:
    config = common.solving()
    config.stage = "sample"
    config.prompts = "woman astronaut|red apple|cat face|house"  # separated by |, or a text file with one per line
    config.seeds = (0, 1, 2, 3)  # one image for each prompt and seed
    config.controls = ""  # ControlNets and their scales, DIR=0.8|FILE.safetensors; their residuals are added up
    config.conditions = ""  # an image for each of them, edges.png|pose.png, resized to the size that is drawn
    config.batch = 8  # images per device and call of the compiled program
    config.update(common.pick(VARIANTS, variant))
    return config.lock()
