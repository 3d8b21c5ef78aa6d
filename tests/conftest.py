"""What the tests share: two CPU cores, PyTorch references that import cleanly, and one measure of difference.

JAX is set to the CPU before anything imports it. Torch costs seconds, so only tests that ask for it pay: take the
`torch` fixture, or call `references()` before importing diffusers, transformers, lpips or pytorch_fid at module level.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("USE_TF", "0")  # transformers imports TensorFlow where it finds it

import jax
import numpy as np
import pytest

from benchmarks.references import randomize, references, relative  # noqa: F401 (tests take them from here)

LONG = ("test_usage", "test_colab", "test_resume", "test_export")  # files of few tests that take minutes


def pytest_collection_modifyitems(items):
    """Long files first, so that no worker is left alone with one at the end."""
    items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.fixture(scope="session")
def torch():
    return references()


def normal(seed: int, *shape: int) -> np.ndarray:
    """Standard normal float32 numbers, the same for torch and JAX."""
    return np.asarray(jax.random.normal(jax.random.key(seed), shape), np.float32)
