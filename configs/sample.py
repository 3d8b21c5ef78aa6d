"""Pictures from prompts, by a teacher or a flow in diffusers layout.

    python -m instaflow_jax.main --config=configs/sample.py --config.prompts='red apple|cat face'
    python -m instaflow_jax.main --config=configs/sample.py:instaflow --config.prompts=prompts.txt
    python -m instaflow_jax.main --config=configs/sample.py:sd15 --config.model=DIR_OR_HUB_ID

Variants: openmoji (embedded, the default; runs on a laptop), sd15, sd21, rf2 (the released 2-rectified flow) and
instaflow (the released one-step model). Writes WORKDIR/sample/*.png, each with its prompt, seed and settings in its
metadata, and a grid with a row a prompt and a column a seed.
"""
from ml_collections import ConfigDict

VARIANTS = {
    "openmoji": {"model": "openmoji", "N": 25, "alpha": 4.0},
    "sd15": {"model": "stable-diffusion-v1-5/stable-diffusion-v1-5", "N": 25, "alpha": 7.5},
    "sd21": {"model": "stabilityai/stable-diffusion-2-1", "N": 25, "alpha": 7.5},
    "rf2": {"model": "XCLiu/2_rectified_flow_from_sd_1_5", "kind": "flow", "N": 25, "alpha": 1.5},
    "instaflow": {"model": "XCLiu/instaflow_0_9B_from_sd_1_5", "kind": "flow", "N": 1, "alpha": 1.0},
}


def get_config(variant: str = "openmoji") -> ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f"configs/sample.py has no variant {variant!r}; it has {', '.join(VARIANTS)}")
    config = ConfigDict()
    config.stage = "sample"
    config.model = ""  # embedded name, directory or hub id, in diffusers layout
    config.weights_variant = ""  # "fp16" reads model.fp16.safetensors and the like
    config.kind = "auto"  # flow or teacher, where the directory does not say it right
    config.solver = "auto"  # teacher: dpm_solver, ddim; flow: euler, heun; auto takes the first
    config.N = 25  # steps
    config.alpha = 1.0  # guidance; 1 is none
    config.prompts = "woman astronaut|red apple|cat face|house"  # split at |, or a text file with a prompt a line
    config.negative = ""  # negative prompt; needs alpha > 1
    config.seeds = (0, 1, 2, 3)  # a picture for each prompt and seed
    config.height = 0  # pixels; 0 is the size the model was made for
    config.width = 0
    config.batch = 8  # pictures a call of the compiled program
    config.dtype = "float32"  # or bfloat16, the type products are computed in
    config.attention = "xla"  # or cudnn (NVIDIA, bfloat16)
    config.update(VARIANTS[variant])
    return config.lock()
