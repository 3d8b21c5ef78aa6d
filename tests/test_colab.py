"""The notebooks: each runs from top to bottom with small numbers, and the ones in the tree have outputs."""

import base64
import dataclasses
import io
import re
import shutil
from pathlib import Path

import nbformat
import numpy as np
import pytest
from helpers import make_tiny
from nbclient import NotebookClient
from PIL import Image

from instaflow_jax import pipeline, sampling
from instaflow_jax.data.openmoji import dataset as openmoji
from instaflow_jax.data.openmoji import drawing
from instaflow_jax.stages.common import flow_training
from instaflow_jax.train import warm_start

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))
IMAGES = {"1_one_step": 3, "2_whole_pipeline": 9, "3_export_and_load_elsewhere": 3}  # at least
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
    ran = execute("3_export_and_load_elsewhere", TORCH, WORKDIR=str(one_step), PROMPTS="red apple|cat face")
    differences = re.findall(r"differs from ours by at most (\d+) of 255 levels", ran.text)
    assert len(differences) == 2 and all(int(difference) <= 1 for difference in differences)
    assert "instaflow_jax loaded in this process: False" in ran.text
    assert "StableDiffusionPipeline with DPMSolverMultistepScheduler" in ran.text
    assert ran.images[-1].shape == (3 * 128, 2 * 128, 3) and ran.images[-1].std() > 10


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


@pytest.mark.parametrize("name", IMAGES)
def test_the_code_comes_from_wherever_the_reader_has_it(name):
    first = next(cell.source for cell in read(name).cells if cell.cell_type == "code")
    assert 'REPOSITORY = ""' in first and "git clone" in first and "http" not in first


def test_every_notebook_is_tested():
    assert [path.stem for path in NOTEBOOKS] == list(IMAGES)
