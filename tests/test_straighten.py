"""Stages `reflow` and `distill` on a tiny random model: each makes what it lacks, resumes, and writes a flow that samples."""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from helpers import distill_config, read_config, reflow_config

from instaflow_jax import main, pipeline
from instaflow_jax.models.unet import UNet2DConditionModel
from instaflow_jax.stages.common import flow_training as straighten

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def run(teacher, tmp_path_factory):
    """`distill` in an empty folder, which must run everything before it."""
    workdir = tmp_path_factory.mktemp("run")
    main.run(distill_config(teacher), str(workdir))
    return workdir


def unet(folder):
    return UNet2DConditionModel.from_pretrained(folder / "export", "unet")[1]


def test_distill_makes_pairs_and_reflow_first(run, teacher):
    for folder in (run / "pairs", run / "reflow" / "pairs"):
        assert json.loads((folder / "manifest.json").read_text())["recipe"]["count"] == 8
    for folder in (run / "reflow", run / "distill"):
        assert (folder / "grids" / "0000004.png").is_file()
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
        assert any("straightness" in row for row in rows)
    weights = [
        UNet2DConditionModel.from_pretrained(teacher, "unet")[1],
        unet(run / "reflow"),
        unet(run / "distill"),
    ]
    for before, after in itertools.pairwise(weights):
        assert any(np.any(before[name] != after[name]) for name in before)


def test_what_they_write_is_sampled_as_a_flow(run, tmp_path):
    config = read_config("sample")
    config.update({"model": str(run / "distill" / "export"), "prompts": "house", "seeds": (0,), "N": 1, "alpha": 1.0})
    main.run(config, str(tmp_path))
    assert (tmp_path / "sample" / "000_house_seed0_N1_alpha1.png").is_file()


def test_a_second_run_reuses_what_is_there(run, teacher, capsys):
    before = unet(run / "distill")
    main.run(distill_config(teacher), str(run))
    said = capsys.readouterr().out
    assert "reflow first" not in said and "generating pairs" not in said
    after = unet(run / "distill")
    assert all(np.array_equal(p, after[name]) for name, p in before.items())


def test_two_and_two_steps_equal_four(run, teacher, tmp_path):
    """Reflow broken off after two steps and started again, on pairs made anew: the same weights, bit for bit."""
    for steps in (2, 4):
        config = reflow_config(teacher)
        config.loop.steps = steps
        main.run(config, str(tmp_path))
    once, twice = unet(run / "reflow"), unet(tmp_path / "reflow")
    assert all(np.array_equal(p, twice[name]) for name, p in once.items())


def test_direct_distillation_learns_from_the_teachers_pairs(run, teacher):
    main.run(distill_config(teacher, "direct"), str(run))
    assert (run / "direct" / "export" / "model_index.json").is_file()


@pytest.mark.parametrize(
    "fields,words",
    [
        ({"dtype": "int8"}, "config.dtype='int8' is not one of"),
        ({"prompt_dropout": 1.5}, "config.prompt_dropout=1.5 must be a share"),
        ({"eval_every": 0}, "config.eval_every=0"),
        ({"distance": "taste"}, "config.distance='taste' is not one of l2, lpips"),
        ({"match": 1.0}, "match=1.0 must be a share"),
        ({"batch_size": 9}, "batch_size=9 must be 1 to the 8 pairs there are"),
    ],
)
def test_bad_settings_end_in_one_clear_message(fields, words, run, teacher):
    config = distill_config(teacher)
    config.update(fields)
    with pytest.raises(ValueError) as error:
        main.run(config, str(run))
    assert words in str(error.value)


def test_pairs_of_another_teacher_are_refused(run, teacher):
    config = reflow_config(teacher)
    config.model = "openmoji"
    pipe = pipeline.load(str(teacher), variant=None, attention="xla")
    other = UNet2DConditionModel.from_config(pipe.nets["unet"].raw_config | {"in_channels": 5})
    pipe.nets["unet"] = other
    with pytest.raises(ValueError, match="made by another teacher"):
        straighten.fit(config, run / "x", pipe, straighten.need_pairs(config.pairs, run), None, {})


def test_a_flow_of_the_other_sign_is_refused_as_a_start(teacher):
    pipe = pipeline.load(str(teacher), variant=None, attention="xla")
    stock = dataclasses.replace(pipe, scheduler={"_class_name": "FlowMatchEulerDiscreteScheduler"})
    with pytest.raises(ValueError, match="predicts -1 of X1 − X0 .*convention=released"):
        straighten.start_from(read_config("reflow"), stock)


def test_a_warm_start_changes_sign_and_clock_of_a_teacher_alone(teacher):
    pipe = pipeline.load(str(teacher), variant=None, attention="xla")
    flow_pipe = dataclasses.replace(pipe, index=pipe.index | {"_class_name": "RectifiedFlowPipeline"})
    config = read_config("reflow")
    assert straighten.start_from(config, flow_pipe) is pipe.params["unet"]
    started = straighten.start_from(config, pipe)
    np.testing.assert_array_equal(started["conv_out.kernel"], -np.asarray(pipe.params["unet"]["conv_out.kernel"]))
    config.warm_start = False
    assert straighten.start_from(config, pipe) is pipe.params["unet"]
