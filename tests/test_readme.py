"""README and docs/: every command's config, variant and fields exist, the snippets run, the links lead somewhere."""

import re
from importlib import import_module

import pytest
from helpers import DOCUMENTS, FENCES, MAIN, ROOT, commands, parse

from instaflow_jax import main


@pytest.mark.parametrize("words", commands(*MAIN), ids=" ".join)
def test_command_names_a_stage_and_fields_that_exist(words, monkeypatch):
    config = parse(words, monkeypatch)
    assert callable(import_module(f"instaflow_jax.stages.{main.STAGES[config.stage]}").run)


def test_every_stage_is_shown(monkeypatch):
    assert {parse(words, monkeypatch).stage for words in commands(*MAIN)} == set(main.STAGES)


@pytest.mark.parametrize("module", sorted({words[2] for words in commands("python", "-m") if words[:3] != MAIN}))
def test_other_modules_are_there(module):
    assert (ROOT / (module.replace(".", "/") + ".py")).is_file()


@pytest.mark.slow
def test_python_runs(monkeypatch, tmp_path):
    """The snippets as they stand, with the embedded model for the reader's own directory."""
    import numpy as np

    from instaflow_jax import pipeline

    monkeypatch.chdir(tmp_path)
    pipe = pipeline.load("openmoji", variant=None, attention="xla")
    names = {"latents": np.zeros((1, *pipe.latent_shape), np.float32), "text": np.zeros((1, 16, 128), np.float32)}
    snippets = [text for language, text in FENCES if language == "python"]
    assert snippets
    for text in snippets:
        exec(text.replace("DIR_OR_HUB_ID", pipeline.locate("openmoji")), names)
    assert names["v"].shape == names["latents"].shape and (tmp_path / "elsewhere" / "unet" / "config.json").is_file()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_images_exist(path):
    links = re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8"))
    missing = [link for link in links if not link.startswith("http") and not (path.parent / link).exists()]
    assert not missing


def test_the_readme_is_short_and_free_of_placeholders():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert not [path.name for path in DOCUMENTS if re.search(r"@[A-Z_]+@", path.read_text(encoding="utf-8"))]
