"""Pairs (X0, text, X1) by a teacher's ODE, the input of reflow and distillation.

    python -m instaflow_jax.main --config=configs/generate.py --workdir=DIR --cpu_devices=2
    python -m instaflow_jax.main --config=configs/generate.py:sd15 --config.prompts.source='laion/*.parquet' \\
        --config.prompts.column=TEXT --config.count=3200000 --config.plan=true

Writes DIR/pairs, which TFDS opens (`tfds.builder_from_directory`) and training reads. It may be killed at any moment:
started again with the same config it makes the shards that are missing. Several machines share the work with
`--config.processes=4 --config.process=0` (to 3) and one directory.

Noise, prompts and token ids of pair i depend on the seed, the prompts and i alone. So does X1, to the byte, for any number
of CPU devices and processes; another batch size, kind of device or version of XLA may change its last bit of float16.

Measured with the first command on two CPU cores: 4,096 pairs in 3 min 36 s, start and compilation included (19.5 pairs/s;
10.9 with the CPU left whole). A pair is 7.03 GFLOP and 0.10 core-seconds, almost all of it in the UNet's convolutions and
products at 65 GFLOP/s a core, which bound it. Not measured on a GPU.
"""

from ml_collections import ConfigDict

from configs import common

# Stable Diffusion as in the paper; 2-rectified flow as the teacher of distillation
_LARGE = {"shard_size": 8192, "dtype": "bfloat16"}
VARIANTS = {
    "openmoji": {"model": "openmoji", "N": 25, "alpha": 3.0, "count": 4096},
    "sd15": {"model": "stable-diffusion-v1-5/stable-diffusion-v1-5", "N": 25, "alpha": 5.0, **_LARGE},
    "rf2": {"model": "XCLiu/2_rectified_flow_from_sd_1_5", "dynamics": "flow", "N": 25, "alpha": 1.5, **_LARGE},
}


def get_config(variant: str = "openmoji") -> ConfigDict:
    config = common.solving()
    config.stage = "generate"
    config.count = 0  # pairs; 0 is one for each prompt, and more than there are prompts begins them again
    config.seed = 0  # with a pair's number, all that its noise depends on
    config.prompts = {
        "source": "openmoji",  # or a .txt, .jsonl or .parquet file, a glob of them, or tfds:NAME
        "column": "",  # where the text is in JSONL, Parquet or TFDS: "TEXT", "captions.text"
        "split": "train",  # of a TFDS set
        "data_dir": "",  # of TFDS; "" is its default
        "cleaning": {"normalize": True, "min_chars": 1, "max_chars": 0, "unique": False},  # data/prompts.py explains
    }
    config.batch = 16  # pairs a device and call of the compiled program
    config.shard_size = 128  # pairs a file, what a kill can cost; a multiple of batch × devices wastes nothing
    config.store_noise = True  # False keeps a checksum of X0 in its place and draws it again when read
    config.processes = 0  # that share the work; 0 takes what jax.distributed knows
    config.process = 0  # this one
    config.preview = 8  # pairs drawn in preview.png
    config.inspect = False  # only check and show what is there
    config.plan = False  # only say what it would cost,
    config.plan_devices = 8  # ... on so many devices
    config.update(common.pick(VARIANTS, variant))
    return config.lock()
