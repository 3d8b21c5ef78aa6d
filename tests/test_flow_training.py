"""Stages `reflow` and `distill` on a tiny random model: each makes what is missing, resumes, and exports a flow."""

import dataclasses
import itertools
import json
import math
import re

import numpy as np
import optax
import pytest
from helpers import control_config, distill_config, load, progressive_config, read_config, refine_config, reflow_config

from instaflow_jax import main, sampling
from instaflow_jax.data import noise
from instaflow_jax.infra.checkpoint import Checkpoints
from instaflow_jax.models.unet import UNet2DConditionModel
from instaflow_jax.stages.common import fit, flow_training
from instaflow_jax.stages.common.ranges import check_ranges
from instaflow_jax.stages.generate.stage import need_pairs
from instaflow_jax.train import state as train_state

pytestmark = pytest.mark.usefixtures("fast_compilation")


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
        config.loop.steps, config.resume = steps, "force"  # the schedule of the first run ends at step 2
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
        ({"match": 1.0}, "config.match=1.0 must be from 0 to"),
        ({"batch_size": 9}, "batch_size=9 must be from 1 to 8, the number of examples"),
    ],
)
@pytest.mark.slow
def test_bad_settings_end_in_one_clear_message(fields, words, run, teacher):
    config = distill_config(teacher)
    config.update_from_flattened_dict(fields | {"resume": "force"})
    with pytest.raises(ValueError) as error:
        main.run(config, str(run))
    assert words in str(error.value)


@pytest.mark.slow
def test_pairs_of_another_teacher_are_refused(run, teacher):
    config, pipe = reflow_config(teacher), load(teacher)
    pipe.nets["unet"] = UNet2DConditionModel.from_config(pipe.nets["unet"].raw_config | {"in_channels": 5})
    options, pairs = flow_training.read_flow_options(config), need_pairs(config.pairs, run)
    with pytest.raises(ValueError, match="made by another teacher"):
        flow_training.train_flow(options, run / "x", pipe, pairs, lambda *_: None, {}, source="")


@pytest.mark.slow
def test_pairs_that_the_config_would_not_make_are_used_with_a_warning(run, teacher, capsys):
    pairs = reflow_config(teacher).pairs
    assert len(need_pairs(pairs, run)) == pairs.count and "warning" not in capsys.readouterr().out
    before = pairs.count, pairs.alpha
    pairs.update({"count": 99, "alpha": 2.5})
    assert len(need_pairs(pairs, run)) == before[0]
    words = f"config.pairs has count=99 (not {before[0]}), alpha=2.5 (not {before[1]})"
    assert words in capsys.readouterr().out


@pytest.mark.parametrize(
    "fields,words",
    [
        ({"dtype": "int8"}, "config.dtype='int8' is not one of"),
        ({"prompt_dropout": 1.5}, "config.prompt_dropout=1.5 must be from 0 to 1"),
        ({"eval_every": 0}, "config.eval_every=0 must be at least 1"),
        ({"remat.unet": "some"}, "config.remat.unet='some' is not one of none, attention, blocks"),
    ],
)
def test_bad_fields_are_refused_before_anything_is_loaded(fields, words):
    config = read_config("reflow")
    config.update_from_flattened_dict(fields)
    with pytest.raises(ValueError, match=re.escape(words)):
        flow_training.read_flow_options(config)


@pytest.mark.slow
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
        ("reflow", {"k": 3, "later.pairs.solver": "ddim"}, "solver='ddim' does not fit a flow"),
        ("reflow", {"model": "nowhere"}, "nowhere"),
        ("reflow", {"pairs.solver": "euler"}, "solver='euler' does not fit a teacher"),
        ("distill", {"match": 1.0}, "match=1.0 must be from 0 to"),
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
        ("distill", {"penalty": "cubic"}, "penalty='cubic' is unknown: use one of squared"),
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


@pytest.mark.parametrize(
    "stage", ["sample", "generate", "reflow", "distill", "refine", "progressive", "control", "export", "pretrain"]
)
def test_check_only_checks(stage, teacher, tmp_path, capsys):
    shrunk = {"reflow": reflow_config, "distill": distill_config, "progressive": progressive_config}
    shrunk |= {"refine": refine_config, "control": control_config}
    config = shrunk.get(stage, lambda _: read_config(stage))(teacher)
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


# ---------------------------------------------------------------- ranges

CONFIGS = [
    *(("sample", v) for v in ("openmoji", "instaflow")),
    *(("reflow", v) for v in ("openmoji", "sd15", "sd15_2")),
    *((stage, "openmoji") for stage in ("refine", "control")),
    *(("progressive", v) for v in ("openmoji", "sd15")),
    *(("distill", v) for v in ("openmoji", "direct", "sd15_lpips", "sd15_consistency")),
    *(("pretrain", v) for v in ("autoencoder", "diffusion", "clip", "classifier")),
    *(("evaluate", v) for v in ("openmoji", "coco5k")),
    *(("generate", "rf2"), ("serve", "openmoji"), ("export", "openmoji"), ("demo", "full")),
]


def numbers(config, prefix=""):
    """Dotted name and value of every number and tuple of numbers."""
    for name, value in config.items():
        if hasattr(value, "items"):
            yield from numbers(value, f"{prefix}{name}.")
        first = value[0] if isinstance(value, tuple) and value else value
        if isinstance(first, int | float) and not isinstance(first, bool):
            yield prefix + name, value


@pytest.mark.slow
@pytest.mark.parametrize("stage,variant", CONFIGS)
def test_every_number_of_every_config_has_a_range(stage, variant):
    """The shipped values pass; NaN, an infinite float and integers wider than 64 bits never do."""
    config = read_config(stage, variant).copy_and_resolve_references().unlock()
    check_ranges(config)
    for name, value in list(numbers(config)):
        first = value[0] if isinstance(value, tuple) else value
        for wrong in (2**64, -(2**64)) if isinstance(first, int) else (math.nan, -math.inf, 1e39, 1e-60):
            config.update_from_flattened_dict({name: (wrong,) if isinstance(value, tuple) else wrong})
            with pytest.raises(ValueError, match=re.escape(f"{name.split('.')[-1]}=")) as refused:
                check_ranges(config)
            assert "\n" not in str(refused.value)
        config.update_from_flattened_dict({name: value})


@pytest.mark.parametrize(
    "stage,field,value,words",
    [
        ("reflow", "schedule.peak", math.nan, "config.schedule.peak=nan is not a finite number"),
        ("reflow", "ema_decay", 2.0, "config.ema_decay=2.0 must be from 0 to 1"),
        ("reflow", "optim.b1", 1.5, "config.optim.b1=1.5 must be from 0 to 0.9999999"),
        ("reflow", "optim.b2", 0.99999999999, "config.optim.b2=0.99999999999 must be"),  # 1 in float32: division by 0
        ("reflow", "optim.eps", 1e-60, "config.optim.eps=1e-60 does not fit into float32"),
        ("reflow", "loop.save_every", 0, "config.loop.save_every=0 must be at least 1"),
        ("reflow", "loop.steps", 2**31, "config.loop.steps=2147483648 must be from 1 to 2147483647"),
        ("reflow", "loop.profile_steps", (5, 3), "config.loop.profile_steps=(5, 3) must be (first, last)"),
        ("reflow", "accumulate", 0, "config.accumulate=0 must be at least 1"),
        ("reflow", "k", 1, "config.k=1 must be at least 2"),
        ("reflow", "later.schedule.peak", math.nan, "config.later.schedule.peak=nan is not a finite number"),
        ("reflow", "eval.N", (0,), "config.eval.N=(0,) must be at least 1"),
        ("reflow", "eval.prompts", (), "config.eval.prompts=() must have at least one value"),
        ("reflow", "seed", 2**32, "config.seed=4294967296 must be from 0 to 4294967295"),
        ("reflow", "pairs.alpha", math.inf, "config.pairs.alpha=inf is not a finite number"),
        ("distill", "reflow.pairs.seed", -1, "config.reflow.pairs.seed=-1 must be from 0 to 18446744073709551615"),
        ("sample", "alpha", math.nan, "config.alpha=nan is not a finite number"),
        ("sample", "seeds", (0, 2**32), "config.seeds=(0, 4294967296) must be from 0 to 4294967295"),
        ("sample", "prompts", "", "config.prompts='' holds no prompt"),
        ("sample", "prompts", " | ", "config.prompts=' | ' holds no prompt"),
        ("sample", "loras", "x.safetensors=1e999", "config.loras='x.safetensors=1e999': a scale does not fit"),
        ("sample", "delta.scale", math.inf, "config.delta.scale=inf is not a finite number"),
        ("serve", "port", 70000, "config.port=70000 must be from 0 to 65535"),
        ("demo", "distill.ema_decay", -1.0, "config.distill.ema_decay=-1.0 must be from 0 to 1"),
        ("evaluate", "seed", 2**64 - 2, "config.seed=18446744073709551614 must be from 0 to 18446744073709551613"),
    ],
)
def test_numbers_out_of_range_are_refused_before_anything_is_written(stage, field, value, words, tmp_path):
    config = read_config(stage)
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ValueError, match=re.escape(words)):
        main.run(config, str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_clipping_may_be_turned_off():
    config = read_config("reflow")
    config.optim.clip = math.inf
    check_ranges(config)


def test_noise_refuses_seeds_that_would_become_others():
    with pytest.raises(ValueError, match="use seeds from 0 to 4294967295"):
        sampling.noise(np.array([2**32]), (2, 2, 1))
    assert np.isfinite(sampling.noise(np.array([2**32 - 1]), (2, 2, 1))).all()
    for seed, number in ((2**64, 0), (0, -1)):
        with pytest.raises(ValueError, match="use integers from 0 to 18446744073709551615"):
            noise.noise(seed, number, (2, 2, 1))


# ---------------------------------------------------------------- resuming under another config


@pytest.fixture
def half_finished(tmp_path):
    """A workdir with a checkpoint of step 4 of reflow, whose arrays do not matter."""
    checkpoints = Checkpoints(tmp_path / "reflow" / "checkpoints", keep_last=1, keep_every=0)
    small = train_state.create({"a": np.ones(2, np.float32)}, optax.sgd(1.0))
    checkpoints.save(4, small, {"step": 4}, read_config("reflow").to_dict())
    checkpoints.close()
    return tmp_path


@pytest.mark.parametrize(
    "fields,words",
    [
        ({"schedule.peak": 2e-3}, ["schedule.peak=0.002, there 0.001"]),
        ({"ema_decay": 0.5, "optim.b1": 0.5}, ["ema_decay=0.5, there 0.99", "optim.b1=0.5, there 0.9"]),
        ({"pairs.alpha": 3.0}, ["pairs.alpha=3.0, there 2.0"]),
        ({"loop.steps": 3}, ["loop.steps=3, there 1500"]),
        ({"loop.steps": 3000}, ["schedule.total_steps=3000, there 1500"]),  # the cosine would change
    ],
)
def test_a_run_is_not_continued_with_other_settings(fields, words, half_finished):
    config = read_config("reflow")
    config.update_from_flattened_dict(fields)
    with pytest.raises(ValueError, match=r"at step 4 .*another --workdir, or --config\.resume=force") as refused:
        main.run(config, str(half_finished))
    assert all(word in str(refused.value) for word in words) and "\n" not in str(refused.value)
    assert not (half_finished / "pairs").exists()
    config.resume = "force"
    fit.check_same_run(fit.read_train_options(config), half_finished / "reflow")


@pytest.mark.parametrize(
    "fields",
    [{}, {"loop.save_every": 7, "eval.N": (2,), "fsdp": 2, "pairs.batch": 3}, {"checkpoints.keep_last": 5}],
)
def test_settings_that_change_no_weights_may_differ(fields, half_finished):
    config = read_config("reflow")
    config.update_from_flattened_dict(fields)
    fit.check_same_run(fit.read_train_options(config), half_finished / "reflow")


def test_a_distillation_from_before_penalties_is_continued_with_the_squared_error_only(tmp_path):
    checkpoints = Checkpoints(tmp_path / "distill" / "checkpoints", keep_last=1, keep_every=0)
    old = read_config("distill").to_dict()
    del old["penalty"]
    checkpoints.save(4, train_state.create({"a": np.ones(2, np.float32)}, optax.sgd(1.0)), {"step": 4}, old)
    checkpoints.close()
    config = read_config("distill")
    with pytest.raises(ValueError, match="penalty='pseudo_huber', there 'squared'"):
        fit.check_same_run(fit.read_train_options(config), tmp_path / "distill")
    config.penalty = "squared"
    fit.check_same_run(fit.read_train_options(config), tmp_path / "distill")


def test_a_run_of_version_0_1_is_continued(half_finished):
    """Its config has other names for some fields, and lacks others."""
    path = half_finished / "reflow" / "checkpoints" / "4"
    (path / "checksums.json").unlink(missing_ok=True)  # version 0.1 wrote none
    saved = path / "config" / "metadata"
    old = json.loads(saved.read_text())
    old["watch_every"], old["start"] = old.pop("eval_every"), ""
    old["schedule"]["kind"] = old["schedule"].pop("name")
    del old["resume"]
    saved.write_text(json.dumps(old))
    fit.check_same_run(fit.read_train_options(read_config("reflow")), half_finished / "reflow")
