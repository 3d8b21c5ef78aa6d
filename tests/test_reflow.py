"""Repeated reflow on a tiny random model: the 2- and the 3-rectified flow in one command, killed and resumed."""

import shutil

import numpy as np
import pytest
from helpers import killed_at, reflow_config

from instaflow_jax import main
from instaflow_jax.infra.checkpoint import load_config
from instaflow_jax.models.unet import UNet2DConditionModel


def configured(teacher):
    config = reflow_config(teacher)
    config.k = 3
    return config


def unet(folder):
    return UNet2DConditionModel.from_pretrained(folder / "export", "unet")[1]


@pytest.fixture(scope="module")
def killed(only_training, teacher, tmp_path_factory):
    """A workdir in which the second reflow was killed in its third step."""
    workdir = tmp_path_factory.mktemp("killed")
    with killed_at(4 + 3):
        main.run(configured(teacher), str(workdir))
    return workdir


@pytest.mark.slow
def test_a_second_reflow_that_was_killed_ends_the_same(killed, teacher, tmp_path, monkeypatch, capsys):
    """It continues from its second step in a moved workdir, under a relative path; the other starts at 0."""
    moved, fresh = (shutil.copytree(killed, tmp_path / name) for name in ("moved", "fresh"))
    assert not (moved / "reflow_3" / "export").exists() and (moved / "reflow_3" / "checkpoints" / "2").is_dir()
    shutil.rmtree(fresh / "reflow_3")
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    main.run(configured(teacher), "moved")
    main.run(configured(teacher), str(fresh))
    printed = capsys.readouterr().out
    assert "generating pairs" not in printed and printed.count("wrote the flow to") == 2
    first, once, twice = unet(fresh / "reflow"), unet(fresh / "reflow_3"), unet(moved / "reflow_3")
    assert all(np.array_equal(p, twice[name]) for name, p in once.items())
    assert any(np.any(p != once[name]) for name, p in first.items())
    assert all(np.array_equal(p, first[name]) for name, p in unet(killed / "reflow").items())


@pytest.mark.slow
def test_a_second_reflow_learns_from_the_pairs_of_the_first(killed):
    saved = load_config(killed / "reflow_3" / "checkpoints", step=None)
    assert saved["model"] == saved["pairs"]["model"] == str(killed / "reflow" / "export")
    assert saved["pairs"]["dynamics"] == "flow" and saved["schedule"]["peak"] == 3e-4
    assert load_config(killed / "reflow" / "checkpoints", step=None)["model"] != saved["model"]
    assert all((folder / "pairs" / "manifest.json").is_file() for folder in (killed, killed / "reflow"))
