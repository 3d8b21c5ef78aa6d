"""Stages `reflow` and `distill` on a tiny random model: each makes what is missing, resumes, and exports a flow."""

import dataclasses
import itertools
import json
import re

import numpy as np
import pytest
from helpers import distill_config, load, read_config, reflow_config

from instaflow_jax import main
from instaflow_jax.models.unet import UNet2DConditionModel
from instaflow_jax.stages.common import flow_training
from instaflow_jax.stages.generate.stage import need_pairs


@pytest.fixture(scope="module")
def run(teacher, tmp_path_factory):
    """`distill` in an empty folder, which has to run everything that comes before it."""
    workdir = tmp_path_factory.mktemp("run")
    main.run(distill_config(teacher), str(workdir))
    return workdir


def unet(folder):
    return UNet2DConditionModel.from_pretrained(folder / "export", "unet")[1]


@pytest.mark.slow
def test_distill_makes_pairs_and_reflow_first(run, teacher):
    for folder in (run / "pairs", run / "reflow" / "pairs"):
        assert json.loads((folder / "manifest.json").read_text())["recipe"]["count"] == 8
    for folder in (run / "reflow", run / "distill"):
        assert (folder / "grids" / "0000004.png").is_file()
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
        assert any("straightness" in row for row in rows)
    weights = [UNet2DConditionModel.from_pretrained(teacher, "unet")[1], unet(run / "reflow"), unet(run / "distill")]
    for before, after in itertools.pairwise(weights):
        assert any(np.any(before[name] != after[name]) for name in before)


@pytest.mark.slow
def test_the_exports_are_sampled_as_flows(run, tmp_path):
    config = read_config("sample")
    config.update({"model": str(run / "distill" / "export"), "prompts": "house", "seeds": (0,), "N": 1, "alpha": 1.0})
    main.run(config, str(tmp_path))
    assert (tmp_path / "sample" / "000_house_seed0_N1_alpha1.png").is_file()


@pytest.mark.slow
def test_a_second_run_reuses_what_is_there(run, teacher, capsys):
    before = unet(run / "distill")
    main.run(distill_config(teacher), str(run))
    printed = capsys.readouterr().out
    assert "running reflow" not in printed and "generating pairs" not in printed
    after = unet(run / "distill")
    assert all(np.array_equal(p, after[name]) for name, p in before.items())


@pytest.mark.slow
def test_two_and_two_steps_equal_four(run, teacher, tmp_path):
    """Reflow resumed after two steps, on newly generated pairs, gives the same weights, bit for bit."""
    for steps in (2, 4):
        config = reflow_config(teacher)
        config.loop.steps = steps
        main.run(config, str(tmp_path))
    once, twice = unet(run / "reflow"), unet(tmp_path / "reflow")
    assert all(np.array_equal(p, twice[name]) for name, p in once.items())


@pytest.mark.slow
def test_direct_distillation_learns_from_the_teachers_pairs(run, teacher):
    main.run(distill_config(teacher, "direct"), str(run))
    assert (run / "direct" / "export" / "model_index.json").is_file()


@pytest.mark.parametrize(
    "fields,words",
    [
        ({"distance": "taste"}, "config.distance='taste' is not one of l2, lpips"),
        ({"match": 1.0}, "match=1.0 must be a share"),
        ({"batch_size": 9}, "batch_size=9 must be from 1 to 8, the number of examples"),
    ],
)
@pytest.mark.slow
def test_bad_settings_end_in_one_clear_message(fields, words, run, teacher):
    config = distill_config(teacher)
    config.update_from_flattened_dict(fields)
    with pytest.raises(ValueError) as error:
        main.run(config, str(run))
    assert words in str(error.value)


@pytest.mark.slow
def test_pairs_of_another_teacher_are_refused(run, teacher):
    config, pipe = reflow_config(teacher), load(teacher)
    pipe.nets["unet"] = UNet2DConditionModel.from_config(pipe.nets["unet"].raw_config | {"in_channels": 5})
    options, pairs = flow_training.read_flow_options(config), need_pairs(config.pairs, run)
    with pytest.raises(ValueError, match="made by another teacher"):
        flow_training.train_flow(options, run / "x", pipe, pairs, lambda *_: None, {})


@pytest.mark.parametrize(
    "fields,words",
    [
        ({"dtype": "int8"}, "config.dtype='int8' is not one of"),
        ({"prompt_dropout": 1.5}, "config.prompt_dropout=1.5 must be a share"),
        ({"eval_every": 0}, "config.eval_every=0 must be at least 1"),
        ({"remat.unet": "some"}, "config.remat.unet='some' is not one of none, attention, blocks"),
    ],
)
def test_bad_fields_are_refused_before_anything_is_loaded(fields, words):
    config = read_config("reflow")
    config.update_from_flattened_dict(fields)
    with pytest.raises(ValueError, match=re.escape(words)):
        flow_training.read_flow_options(config)


@pytest.mark.parametrize(
    "stage, fields, words",
    [
        ("reflow", {"batch_size": 5, "accumulate": 2}, "config.batch_size=5 must be a multiple of 2"),
        ("reflow", {"accumulate": 0}, "accumulate=0 must be at least 1"),
        ("reflow", {"batch_size": 9}, "batch_size=9 must be from 1 to 8, the number of examples"),
        ("reflow", {"fsdp": 3}, "fsdp=3 must divide the 1 devices"),
        ("reflow", {"schedule.name": "linear"}, "schedule='linear' is unknown"),
        (
            "reflow",
            {"schedule.name": "constant"},
            "config.schedule.name='constant' takes the fields peak, warmup_steps",
        ),
        ("reflow", {"schedule.warmup_steps": 4}, "warmup_steps=4 must be below total_steps=4"),
        ("reflow", {"loss.time": "late"}, "time='late' is unknown"),
        ("reflow", {"model": "nowhere"}, "nowhere"),
        ("reflow", {"pairs.solver": "euler"}, "solver='euler' does not fit a teacher"),
        ("distill", {"match": 1.0}, "match=1.0 must be a share"),
        ("distill", {"distance": "taste"}, "config.distance='taste' is not one of l2, lpips"),
        (
            "distill",
            {"distance": "lpips", "lpips.crop": 3, "lpips.margin": 1},
            "a crop of 5×5 latents, margins included",
        ),
        ("distill", {"distance": "lpips", "lpips.trunk": "nowhere.pth"}, "nowhere.pth"),
        ("distill", {"remat.lpips": "all"}, "config.remat.lpips='all' is not one of"),
        ("distill", {"batch_size": 9}, "batch_size=9 must be from 1 to 8, the number of examples"),
        ("distill", {"pairs.solver": "ddim"}, "solver='ddim' does not fit a flow"),
        ("distill", {"init_from": "nowhere"}, "nowhere"),
        ("distill", {"reflow.loss.penalty": "cubic"}, "penalty='cubic' is unknown"),
        ("distill", {"reflow.pairs.solver": "euler"}, "solver='euler' does not fit a teacher"),
    ],
)
@pytest.mark.parametrize("check", [False, True])
def test_what_can_be_refused_is_refused_before_pairs_are_made(stage, fields, words, check, teacher, tmp_path):
    config = {"reflow": reflow_config, "distill": distill_config}[stage](teacher)
    config.update_from_flattened_dict(fields)
    config.check = check
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(words)):
        main.run(config, str(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stage", ["sample", "generate", "reflow", "distill", "export", "pretrain"])
def test_check_only_checks(stage, teacher, tmp_path, capsys):
    config = {"reflow": reflow_config, "distill": distill_config}.get(stage, lambda _: read_config(stage))(teacher)
    if stage in ("sample", "generate"):
        config.model = str(teacher)
    if stage == "export":
        with config.unlocked():
            config.distill = distill_config(teacher)
    config.check = True
    main.run(config, str(tmp_path))
    assert f"{stage}: every check passed; nothing was run" in capsys.readouterr().out.splitlines()
    assert not list(tmp_path.iterdir())


def test_a_flow_of_the_other_sign_is_refused_as_a_start(teacher):
    stock = dataclasses.replace(load(teacher), scheduler={"_class_name": "FlowMatchEulerDiscreteScheduler"})
    with pytest.raises(ValueError, match=r"predicts -1 of X1 − X0 .*convention=released"):
        flow_training.initial_params(stock, True)


def test_a_warm_start_converts_sign_and_timesteps_of_a_teacher_only(teacher):
    pipe = load(teacher)
    flow_pipe = dataclasses.replace(pipe, index=pipe.index | {"_class_name": "RectifiedFlowPipeline"})
    assert flow_training.initial_params(flow_pipe, True) is pipe.params["unet"]
    converted = flow_training.initial_params(pipe, True)
    np.testing.assert_array_equal(converted["conv_out.kernel"], -np.asarray(pipe.params["unet"]["conv_out.kernel"]))
    assert flow_training.initial_params(pipe, False) is pipe.params["unet"]
