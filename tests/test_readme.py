"""What the README tells people to type: every command's config, variant and fields exist, every link leads somewhere."""

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags

from instaflow_jax import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCES = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
MAIN = ["python", "-m", "instaflow_jax.main"]


def commands_of(text: str, begin: list[str]) -> list[list[str]]:
    """Words of the commands in a shell block that begin so, comments cut off."""
    lines = [shlex.split(line, comments=True) for line in text.replace("\\\n", " ").splitlines()]
    return [words for words in lines if words[: len(begin)] == begin]


def commands(*begin: str) -> list[list[str]]:
    """Words of the commands that begin so, in shell blocks and in running text, each once."""
    text = "\n".join(
        [text for language, text in FENCES if language == "bash"] + re.findall(r"`(python -m [^`\n]+)`", README)
    )
    return [list(words) for words in dict.fromkeys(tuple(words) for words in commands_of(text, list(begin)))]


def parse(words: list[str], monkeypatch):
    """The config that a command line gives, read as `main` reads it."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr("sys.argv", ["main", *words[len(MAIN) :]])
    values = flags.FlagValues()
    config = config_flags.DEFINE_config_file("config", flag_values=values)
    for name in ("workdir", "coordinator"):
        flags.DEFINE_string(name, "", "", flag_values=values)
    for name in ("cpu_devices", "processes", "process"):
        flags.DEFINE_integer(name, 0, "", flag_values=values)
    values(["main", *words[len(MAIN) :]])
    return config.value


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
