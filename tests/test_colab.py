"""The notebooks: each runs from top to bottom with small numbers, and the ones in the tree have outputs."""

import base64
import dataclasses
import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from helpers import make_tiny, need_jax2onnx
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient
from PIL import Image

from instaflow_jax import pipeline, sampling
from instaflow_jax.data.openmoji import dataset as openmoji
from instaflow_jax.data.openmoji import drawing
from instaflow_jax.stages.common import flow_training
from instaflow_jax.train import warm_start

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))
IMAGES = {"1_one_step": 3, "2_whole_pipeline": 9, "3_export_and_load_elsewhere": 5}  # at least
EXTRAS = {"1_one_step": [], "2_whole_pipeline": ["demo"], "3_export_and_load_elsewhere": ["demo", "onnx"]}
EMOJI = ("1F34E", "1F680", "1F951", "1F955", "1F431", "1F3E0", "1F419", "1F41D", "1F433", "1F436")
TORCH = "from benchmarks.references import references\nreferences()"  # makes torchvision importable


@dataclasses.dataclass
class Output:
    """What a notebook shows: its printed text and its images, uint8 [H, W, 3]."""

    text: str
    images: list[np.ndarray]


def read(name):
    return nbformat.read(ROOT / "colab" / f"{name}.ipynb", as_version=4)


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def shown(notebook):
    found = outputs(notebook)
    pngs = [output.data["image/png"] for output in found if "image/png" in output.get("data", {})]
    text = [
        output.text if output.output_type == "stream" else output.get("data", {}).get("text/markdown", "")
        for output in found
    ]
    return Output(
        "".join(text), [np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")) for png in pngs]
    )


def execute(name, before="", **parameters):
    """Runs a notebook in its own kernel, with other values in its cell of parameters."""
    notebook = read(name)
    cell = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    for field, value in parameters.items():
        cell.source, count = re.subn(rf"(?m)^{field} = .*$", f"{field} = {value!r}", cell.source)
        assert count == 1, f"{name} has no parameter {field}"
    quick = "import jax\njax.config.update('jax_disable_most_optimizations', True)"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(f"{before}\n{quick}"))
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    return shown(notebook)


@pytest.fixture(scope="module")
def one_step(tmp_path_factory):
    """A workdir whose distilled model is the embedded teacher with a flow's sign and timesteps."""
    workdir = tmp_path_factory.mktemp("run")
    pipe = pipeline.load("openmoji", variant=None, attention="xla")
    schedule = sampling.read_dynamics(pipe.scheduler, pipe.index, "auto")
    unet = warm_start.from_teacher(pipe.params["unet"], pipe.nets["unet"], schedule, flow_training.NUM_TIMESTEPS)
    flow_training.export(pipe, unet, workdir / "distill" / "export")
    return workdir


@pytest.fixture
def few_emoji(tmp_path):
    """A data set of a few emoji, so that no test waits for drawing."""
    (tmp_path / "svg").mkdir()
    for hexcode in EMOJI:
        shutil.copy(drawing.svg_directory() / f"{hexcode}.svg", tmp_path / "svg")
    openmoji.build(tmp_path / "data", svg_dir=tmp_path / "svg")
    return tmp_path


# ---------------------------------------------------------------- they run


@pytest.mark.slow
def test_one_step_draws_and_walks(one_step):
    ran = execute("1_one_step", WORKDIR=str(one_step), PROMPTS=["red apple", "cat face"], SEEDS=2, FRAMES=5)
    assert "distill/export: a flow, drawn in one step" in ran.text
    assert [image.std() > 10 for image in ran.images] == [True] * 3
    assert ran.images[0].shape == (256, 256, 3)
    distances = re.findall(r"neighbours +([\d.]+) +ends +([\d.]+)", ran.text)
    assert len(distances) == 2 and all(0 < float(near) < float(far) for near, far in distances)


@pytest.mark.slow
def test_one_step_says_when_only_the_teacher_is_there(tmp_path):
    ran = execute("1_one_step", WORKDIR=str(tmp_path), PROMPTS=["red apple"], SEEDS=1, FRAMES=2, TEACHER_N=2)
    assert "There is no one-step model in" in ran.text and "the embedded teacher, which takes 2 steps" in ran.text
    assert len(ran.images) == 3


@pytest.mark.slow
def test_the_whole_pipeline_shows_an_image_after_each_stage(few_emoji):
    ran = execute(
        "2_whole_pipeline",
        WORKDIR=str(few_emoji),
        TEACHER=str(make_tiny(few_emoji / "tiny")),
        PAIRS=32,
        REFLOW_STEPS=2,
        DISTILL_STEPS=2,
        COUNT=8,
    )
    assert len(ran.images) == 9 and all(image.std() > 10 for image in ran.images)
    for words in (
        "all 32 pairs are written",
        "2/2 steps (100 %)",
        "step 2: straightness",
        "reflow + distil, 1 step",
        "8 prompts",
    ):
        assert words in ran.text, words
    for made in ("pairs", "reflow/export/unet", "distill/export/unet", "evaluate/results.json"):
        assert (few_emoji / made).exists(), made


@pytest.mark.slow
def test_exports_are_loaded_elsewhere_and_agree(one_step):
    need_jax2onnx()
    ran = execute("3_export_and_load_elsewhere", TORCH, WORKDIR=str(one_step), PROMPTS="red apple|cat face")
    differences = dict(re.findall(r"(\S.*\S) +differs from ours by at most (\d+) of 255 levels", ran.text))
    limits = {"StableHLO": 1, "ONNX Runtime": 1, "PyTorch": 1, "single file": 8}  # whose weights are in float16
    assert differences.keys() == limits.keys()
    assert all(int(difference) <= limits[name] for name, difference in differences.items()), differences
    assert "the same token ids: True" in ran.text and "2 ModelSamplingSD3 shift=1.0" in ran.text
    assert "instaflow_jax loaded in this process: False" in ran.text
    assert "StableDiffusionPipeline with DPMSolverMultistepScheduler" in ran.text
    assert ran.images[-1].shape == (5 * 128, 2 * 128, 3) and ran.images[-1].std() > 10


# ---------------------------------------------------------------- what is in the tree


@pytest.mark.parametrize("name", IMAGES)
def test_outputs_are_kept_whole_and_of_no_machine(name):
    notebook = read(name)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for output in outputs(notebook) if output.output_type == "error"]
    ran = shown(notebook)
    assert len(ran.images) >= IMAGES[name] and all(image.std() > 10 for image in ran.images)
    assert not re.search(r"""(^|[\s'"(=])[~]?/\w+/\w""", ran.text)
    assert (ROOT / "colab" / f"{name}.ipynb").stat().st_size < 2e6


def test_every_notebook_is_tested():
    assert [path.stem for path in NOTEBOOKS] == list(IMAGES)


# ---------------------------------------------------------------- the install cell

STAND_IN = """
import json, pathlib
def install(root, extras):
    pathlib.Path(root, "called.json").write_text(json.dumps([root, extras]))
"""
UNINSTALLED = """
import os, subprocess, sys, types
sys.path = [path for path in sys.path if not os.path.isfile(os.path.join(path, "instaflow_jax", "__init__.py"))]
sys.path.insert(0, "")
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
def get_ipython():
    return types.SimpleNamespace(system=lambda command: subprocess.run(command.format(**globals()), shell=True))
"""


def make_repository(root):
    """A stand-in for the repository, whose `install` writes down what it is called with."""
    (root / "colab").mkdir(parents=True)
    (root / "instaflow_jax").mkdir()
    (root / "instaflow_jax" / "__init__.py").touch()
    (root / "colab" / "install.py").write_text(STAND_IN)
    return root


def install(folder, name="1_one_step", repository=""):
    """Runs a notebook's install cell in `folder`, in a Python without this package."""
    cell = next(cell.source for cell in read(name).cells if cell.cell_type == "code")
    assert cell.count('REPOSITORY = ""') == 1 and "http" not in cell
    cell = cell.split("for package in (")[0].replace('REPOSITORY = ""', f"REPOSITORY = {str(repository)!r}")
    code = UNINSTALLED + TransformerManager().transform_cell(cell) + "print(os.getcwd())"
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True)


@pytest.mark.parametrize("name,extras", EXTRAS.items())
def test_an_uploaded_folder_is_installed_even_under_the_packages_name(name, extras, tmp_path):
    root = make_repository(tmp_path / "instaflow_jax")
    ran = install(tmp_path, name)
    assert ran.stdout.strip() == str(root), ran.stderr
    assert json.loads((root / "called.json").read_text()) == [str(root), extras]


@pytest.mark.parametrize("uploaded", [True, False])
def test_a_zip_is_unpacked_and_installed(uploaded, tmp_path):
    make_repository(tmp_path / "made" / "repository-main")
    (tmp_path / "here").mkdir()
    archive = shutil.make_archive(tmp_path / ("here" if uploaded else "drive") / "any", "zip", tmp_path / "made")
    ran = install(tmp_path / "here", repository="" if uploaded else archive)
    assert ran.stdout.strip() == str(tmp_path / "here" / "instaflow" / "repository-main"), ran.stderr


def test_an_address_is_cloned(tmp_path):
    root, here = make_repository(tmp_path / "published"), tmp_path / "here"
    here.mkdir()
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "--quiet"], ["add", "."], [*who, "commit", "--quiet", "-m", "Add"]):
        subprocess.run(["git", *words], cwd=root, check=True)
    ran = install(here, repository=f"file://{root}")
    assert ran.stdout.strip() == str(here / "instaflow"), ran.stderr


def test_without_a_repository_the_cell_says_in_one_line_what_to_do(tmp_path):
    ran = install(tmp_path)
    assert ran.stderr.splitlines()[-1].startswith("AssertionError: the repository is not here: upload it as a .zip, or")


# ---------------------------------------------------------------- what pip is asked for

choose = runpy.run_path(str(ROOT / "colab" / "install.py"))["choose"]
REQUIREMENTS = ["jax>=0.10", "numpy", 'jax[tpu]; extra == "tpu"', 'tensorflow-cpu==2.21.*; extra == "demo"']
REQUIREMENTS += ['tensorboard==2.21.*; extra == "demo"', 'emoji==2.16.*; extra == "demo"']
CUDA12 = {"jax": "0.10.1", "jaxlib": "0.10.1", "jax-cuda12-plugin": "0.10.1", "jax-cuda12-pjrt": "0.10.1"}


@pytest.mark.parametrize(
    "found,accelerator,jax,held",
    [
        ({}, "", "jax>=0.10", ()),
        ({}, "gpu", "jax[cuda12]>=0.10", ()),
        ({}, "tpu", "jax[tpu]>=0.10", ()),
        (CUDA12, "gpu", "jax>=0.10", CUDA12),
        (CUDA12 | {"jax": "0.9.2"}, "gpu", "jax[cuda12]>=0.10", ()),
        ({"jax": "0.9.2", "jax-cuda13-plugin": "0.9.2"}, "gpu", "jax[cuda13]>=0.10", ()),
        ({"jax": "0.12.0.1", "libtpu": "0.0.50"}, "tpu", "jax>=0.10", ("jax", "libtpu")),
        ({"jax": "0.9.2", "libtpu": "0.0.40"}, "tpu", "jax[tpu]>=0.10", ()),
        ({"jax": "0.10.2", "jaxlib": "0.10.2"}, "gpu", "jax[cuda12]>=0.10", ("jax", "jaxlib")),
        ({"jax": "0.11.0rc1", "jaxtyping": "0.3"}, "", "jax>=0.10", ("jax",)),
    ],
)
def test_the_runtimes_jax_stays_or_is_replaced_for_the_same_accelerator(found, accelerator, jax, held):
    asked, kept = choose(REQUIREMENTS, [], found, accelerator)
    assert asked == [jax, "numpy"] and kept == {name: found[name] for name in held}


@pytest.mark.parametrize("there", ["tensorflow", "tensorflow-cpu", ""])
def test_a_tensorflow_that_is_there_stays(there):
    asked, _ = choose(REQUIREMENTS, ["demo"], {there: "2.19.0"} if there else {}, "")
    ours = [] if there else ["tensorflow-cpu==2.21.*", "tensorboard==2.21.*"]
    assert asked == ["jax>=0.10", "numpy", *ours, "emoji==2.16.*"]
