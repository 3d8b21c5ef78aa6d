"""Set-up of the test session and the fixtures that several test files share.

JAX is set to the CPU before anything imports it. Importing torch takes seconds, so only tests that need it pay: they
take the `torch` fixture, or call `references()` before importing diffusers, transformers, lpips or pytorch_fid.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("USE_TF", "0")  # transformers imports TensorFlow where it finds it
os.environ.setdefault("EPATH_USE_TF", "false")  # as a run in a bucket sets it; etils asks only once

from jaxtyping import install_import_hook

install_import_hook("instaflow_jax", "typechecker.checked")  # annotations are checked while the tests run

import helpers
import jax
import pytest

from instaflow_jax.data.openmoji import dataset
from instaflow_jax.stages.common import flow_training

LONG = ("test_usage", "test_colab", "test_resume", "test_export")  # files of few tests that take minutes


def pytest_collection_modifyitems(items):
    """Long files first, so that no worker is left alone with one at the end."""
    items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.fixture(scope="session")
def torch():
    """PyTorch, set up as the reference."""
    return helpers.references()


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """A directory with a random Stable Diffusion of 4×4 pixels."""
    return helpers.make_small_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def no_drawing():
    """Smooth images in place of the emoji, so that no test waits for drawing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "load", lambda *_: helpers.make_emoji())
        yield


@pytest.fixture(scope="module")
def fast_compilation():
    """Programs that compile fast and run slowly, in all tests of the module after the first that asks for it.

    Also in the processes that these tests start. Not for comparisons with a reference, which are about what users run.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def only_training(fast_compilation):
    """Flows are trained without the evaluation, which takes as long to compile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flow_training, "make_evaluate", lambda *_: lambda ema, path: {})
        yield


@pytest.fixture(scope="session")
def coco_folder(tmp_path_factory):
    """COCO's official files: val/*.jpg and annotations/captions_val.json."""
    return helpers.make_coco(tmp_path_factory.mktemp("coco"))


@pytest.fixture(scope="session")
def coco_models(tmp_path_factory):
    """A Stable Diffusion and a CLIP of random weights, 16 pixels."""
    return helpers.make_coco_models(tmp_path_factory.mktemp("models"))
