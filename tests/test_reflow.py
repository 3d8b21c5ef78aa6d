"""Repeated reflow on a tiny random model: the 2- and the 3-rectified flow in one command, killed and resumed."""

import shutil

import numpy as np
import pytest
import torch
from helpers import killed_at, load, reflow_config, relative

from instaflow_jax import main, sampling, solvers
from instaflow_jax.infra.checkpoint import load_config
from instaflow_jax.models.unet import UNet2DConditionModel
from instaflow_jax.stages.common.loading import WeightOptions
from instaflow_jax.stages.export import source as export_source


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
def test_a_reflow_that_keeps_the_head_makes_a_teacher_for_one_step_of_ddim(killed, teacher, tmp_path):
    from diffusers import DDIMScheduler

    shutil.copytree(killed / "pairs", tmp_path / "pairs")
    config = reflow_config(teacher)
    config.path = "sd"
    main.run(config, str(tmp_path))
    pipe, before = (load(folder) for folder in (tmp_path / "reflow" / "export", teacher))
    assert any(np.any(p != before.params["unet"][name]) for name, p in pipe.params["unet"].items())
    assert pipe.index["_class_name"] == before.index["_class_name"]
    schedule = sampling.read_dynamics(pipe.scheduler, pipe.index, "auto")
    np.testing.assert_array_equal(schedule.abar, sampling.read_dynamics(before.scheduler, before.index, "auto").abar)
    run = export_source.load(str(tmp_path / "reflow"), "ema", "auto", WeightOptions(attention="xla"))
    assert run.pipe.scheduler == pipe.scheduler and np.array_equal(run.dynamics.abar, schedule.abar)
    assert all(np.array_equal(p, pipe.params["unet"][name]) for name, p in run.pipe.params["unet"].items())

    theirs = DDIMScheduler.from_pretrained(tmp_path / "reflow" / "export" / "scheduler")
    theirs.set_timesteps(1)
    table = sampling.solver_table(schedule, "ddim", 1)
    assert theirs.timesteps.tolist() == table.tau.tolist() == [999]
    x, out = np.full((1, 1, 1, 1), 0.3, np.float32), np.full((1, 1, 1, 1), -0.2, np.float32)
    drawn = solvers.integrate(lambda x, tau: out, solvers.pad(table, 1), x)
    assert relative(np.array(drawn), theirs.step(torch.tensor(out), 999, torch.tensor(x)).prev_sample.numpy()) < 1e-5


@pytest.mark.parametrize(
    "changed,message",
    [
        ({"path": "sdd"}, "config.path='sdd' is not one of flow, sd"),
        ({"path": "sd", "k": 3}, "config.k=3 needs config.path='flow'"),
    ],
)
def test_a_path_that_cannot_be_trained_is_refused(changed, message, teacher, tmp_path):
    config = reflow_config(teacher)
    config.update(changed)
    with pytest.raises(ValueError, match=message):
        main.run(config, str(tmp_path))


@pytest.mark.slow
def test_a_flow_has_no_head_to_keep(killed, tmp_path):
    config = reflow_config(str(killed / "reflow" / "export"))
    config.path = "sd"
    with pytest.raises(ValueError, match=r"config\.path='sd' trains a teacher's own head, but config\.model="):
        main.run(config, str(tmp_path))


@pytest.mark.slow
def test_a_second_reflow_learns_from_the_pairs_of_the_first(killed):
    saved = load_config(killed / "reflow_3" / "checkpoints", step=None)
    assert saved["model"] == saved["pairs"]["model"] == str(killed / "reflow" / "export")
    assert saved["pairs"]["dynamics"] == "flow" and saved["schedule"]["peak"] == 3e-4
    assert load_config(killed / "reflow" / "checkpoints", step=None)["model"] != saved["model"]
    assert all((folder / "pairs" / "manifest.json").is_file() for folder in (killed, killed / "reflow"))
