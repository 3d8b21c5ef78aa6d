"""Pairs (X0, text, X1) by a teacher's ODE, the input of reflow and distillation.

    python -m instaflow_jax.main --config=configs/generate.py --workdir=DIR --cpu_devices=2
    python -m instaflow_jax.main --config=configs/generate.py:sd15 --config.prompts.source='laion/*.parquet' \\
        --config.prompts.column=TEXT --config.count=3200000

Writes DIR/pairs, which TFDS (`tfds.builder_from_directory`) and training read. The run can be killed at any time;
started again with the same config, it makes the missing shards. Several machines can share the work with
`--config.processes=4 --config.process=0` (to 3) and one directory.

Noise, prompt and token ids of pair i depend only on the seed, the prompts and i. So do the bytes of X1, on any number
of CPU devices and processes; another batch size, device type or XLA version may change the last bit of float16.

Measured with the first command on two CPU cores (version 0.1): 4,096 pairs in 3 min 36 s with start-up and compilation
(19.5 pairs/s; 10.9 without --cpu_devices=2). A pair takes 7.03 GFLOP and 0.10 core-seconds, nearly all in the UNet's
convolutions and matrix products, which run at 65 GFLOP/s per core. Not yet measured on a GPU.
"""

from ml_collections import ConfigDict

from configs import common

# sd15: the paper's teacher; rf2: 2-rectified flow, the teacher of distillation
_LARGE = {"shard_size": 8192, "dtype": "bfloat16"}
VARIANTS = {
    "openmoji": {"model": "openmoji", "N": 25, "alpha": 2.0, "count": 4096},
    "sd15": {"model": "stable-diffusion-v1-5/stable-diffusion-v1-5", "N": 25, "alpha": 5.0, **_LARGE},
    "rf2": {"model": "XCLiu/2_rectified_flow_from_sd_1_5", "dynamics": "flow", "N": 25, "alpha": 1.5, **_LARGE},
}


def get_config(variant: str = "openmoji") -> ConfigDict:
    config = common.solving()
    config.stage = "generate"
    config.count = 0  # number of pairs; 0 means one per prompt; prompts repeat if there are fewer
    config.seed = 0  # seed and pair number determine the noise
    config.prompts = {
        "source": "openmoji",  # or openmoji_kinds, a .txt, .jsonl or .parquet file, a glob of them, or tfds:NAME
        "column": "",  # column of the text in JSONL, Parquet or TFDS: "TEXT", "captions.text"
        "split": "train",  # TFDS split
        "data_dir": "",  # directory of TFDS sets; "" means TFDS's default
        "cleaning": {"normalize": True, "min_chars": 1, "max_chars": 0, "unique": False},  # see data/prompts.py
    }
    config.batch = 16  # pairs per device and call of the compiled program
    config.shard_size = 128  # pairs per file; a kill loses at most one file; best a multiple of batch × devices
    config.store_noise = True  # False stores a checksum of X0 instead, and regenerates X0 when reading
    config.processes = 0  # number of processes that share the work; 0 takes it from jax.distributed
    config.process = 0  # number of this process
    config.preview = 8  # pairs drawn in preview.png
    config.inspect = False  # only check and show existing pairs
    config.update(common.pick(VARIANTS, variant))
    return config.lock()
