"""What the README tells people to type: every command's config, variant and fields exist, every link leads somewhere."""

import re
from importlib import import_module

import pytest
from helpers import FENCES, MAIN, README, ROOT, commands, parse

from instaflow_jax import main


@pytest.mark.parametrize("words", commands(*MAIN), ids=" ".join)
def test_command_names_a_stage_and_fields_that_exist(words, monkeypatch):
    config = parse(words, monkeypatch)
    assert config.stage in main.STAGES
    assert callable(import_module(f"instaflow_jax.stages.{config.stage}").run)


def test_every_stage_is_shown(monkeypatch):
    assert {parse(words, monkeypatch).stage for words in commands(*MAIN)} == set(main.STAGES)


@pytest.mark.parametrize("module", sorted({words[2] for words in commands("python", "-m") if words[:3] != MAIN}))
def test_other_modules_are_there(module):
    assert (ROOT / (module.replace(".", "/") + ".py")).is_file()


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
        exec(text.replace("DIR_OR_HUB_ID", pipeline.locate("openmoji")), names)  # noqa: S102
    assert names["v"].shape == names["latents"].shape and (tmp_path / "elsewhere" / "unet" / "config.json").is_file()


def test_links_and_pictures_exist():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    missing = [link for link in links if not link.startswith("http") and not (ROOT / link).exists()]
    assert not missing
