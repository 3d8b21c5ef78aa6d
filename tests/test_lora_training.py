"""Training of adapters (LoRA): the merged loss, its gradient and shards, the stages, the exported files in PyTorch."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import toy_lora
from helpers import (
    distill_config,
    killed_at,
    load,
    make_directory,
    normal,
    read_config,
    refine_config,
    reflow_config,
    relative,
)
from toy_lora import ADAPTERS, BATCH, WEIGHTS, loss, shapes_of

from instaflow_jax import main, sampling
from instaflow_jax.infra import checkpoint, devices
from instaflow_jax.models.unet import UNet2DConditionModel
from instaflow_jax.stages.common import adapters, flow_training, loading
from instaflow_jax.stages.export import formats as export_formats
from instaflow_jax.stages.export import source as export_source
from instaflow_jax.stages.export import stage as export_stage
from instaflow_jax.stages.export.formats import Options
from instaflow_jax.stages.plan import programs
from instaflow_jax.train import lora
from instaflow_jax.train.lora import BASE, Lora


def random_adapters(adapters, params, seed=0):
    """Both factors as large as the weights, so that errors show."""
    new = lora.init(jax.random.key(seed), lora.find_ranks(adapters, params), shapes_of(params))
    return {name: normal(i + 100 * seed, *p.shape) / 4 for i, (name, p) in enumerate(new.items())}


# ---------------------------------------------------------------- which layers


def test_patterns_choose_layers_and_ranks():
    assert lora.find_ranks(ADAPTERS, WEIGHTS) == {"a.conv1.kernel": 3, "b.to_k.kernel": 2, "b.to_q.kernel": 4}
    assert lora.find_ranks(Lora(3, 3.0, ("q|b.to_k",)), WEIGHTS) == {"b.to_k.kernel": 3}  # whole words only


@pytest.mark.parametrize(
    "targets, ranks, words",
    [
        (("to_q", "to_x"), (), "config.lora.targets: 'to_x' matches no layer of the U-Net"),
        (("to_q",), (("conv1", 2),), "config.lora.ranks: 'conv1' matches no layer that config.lora.targets match"),
        (("to_(q",), (), "config.lora.targets: 'to_(q' is not a regular expression: "),
    ],
)
def test_a_pattern_that_matches_nothing_is_named(targets, ranks, words):
    with pytest.raises(ValueError, match=re.escape(words)) as refused:
        lora.find_ranks(Lora(4, 4.0, targets, ranks), WEIGHTS)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"rank": 0}, "config.lora.rank=0 must be at least 1"),
        ({"rank": 2, "alpha": 0.0}, "config.lora.alpha=0.0 must be"),
        ({"alpha": 2.0}, "config.lora.alpha=2.0 and config.lora.ranks=() have no effect without config.lora.rank"),
        ({"rank": 2, "targets": ()}, "config.lora.targets=() must have at least one value"),
        ({"rank": 2, "ranks": ("to_k=0",)}, "config.lora.ranks: 'to_k=0' is not PATTERN=RANK"),
        ({"rank": 2, "ranks": ("to_k",)}, "config.lora.ranks: 'to_k' is not PATTERN=RANK"),
        ({"rank": 2, "targets": ("to_x",)}, "config.lora.targets: 'to_x' matches no layer"),
    ],
)
@pytest.mark.parametrize("configured", [reflow_config, distill_config])
def test_wrong_fields_are_refused_before_anything_is_made(fields, words, configured, teacher, tmp_path):
    config = configured(teacher)
    config.lora.update(fields)
    with pytest.raises(ValueError, match=re.escape(words)) as refused:
        main.run(config, str(tmp_path))
    assert "\n" not in str(refused.value) and not list(tmp_path.iterdir())


def test_the_block_is_read():
    config = read_config("reflow").lora
    assert adapters.read_lora(config) is None
    config.update({"rank": 4, "ranks": ("ff=0=8",)})
    assert adapters.read_lora(config) == Lora(4, 4.0, tuple(config.targets), (("ff=0", 8),))
    config.alpha = 1
    assert adapters.read_lora(config).alpha == 1.0


# ---------------------------------------------------------------- the loss and the step


def test_new_adapters_change_nothing_and_are_drawn_as_pefts():
    new = lora.init(jax.random.key(0), lora.find_ranks(ADAPTERS, WEIGHTS), shapes_of(WEIGHTS))
    for name, value in lora.merge(WEIGHTS, jax.device_get(new), 6.0).items():
        np.testing.assert_array_equal(value, WEIGHTS[name])
    A, bound = np.asarray(new["a.conv1.lora_A.kernel"]), 1 / 6  # 1/√fan-in: 3 × 3 × 4 inputs
    assert A.shape == (3, 3, 4, 3) and 0.9 * bound < np.abs(A).max() <= bound and abs(A.mean()) < bound / 4


def test_the_gradient_of_adapters_is_that_of_the_merged_loss_by_the_chain_rule():
    """By hand in numpy: dA = alpha/rank · dW Bᵀ, dB = alpha/rank · Aᵀ dW, summed over a convolution's window."""
    params, frozen, key = random_adapters(ADAPTERS, WEIGHTS), {"factor": 2.0}, jax.random.key(1)
    merged = lora.merge(WEIGHTS, params, 6.0)
    gradient, adapted = jax.jit(jax.value_and_grad(loss, has_aux=True)), lora.adapt(loss, 6.0, BASE, {})
    (want, _), dW = gradient(merged, frozen, BATCH, key)
    gradient = jax.jit(jax.value_and_grad(adapted, has_aux=True))
    (value, _), found = gradient(params, frozen | {BASE: WEIGHTS}, BATCH, key)
    assert relative(value, want) < 1e-5 and len(found) == 6
    for name, rank in lora.find_ranks(ADAPTERS, WEIGHTS).items():
        layer, full = name.removesuffix(".kernel"), np.asarray(dW[name], np.float64)
        A, B = (params[f"{layer}.lora_{part}.kernel"].astype(np.float64) for part in "AB")
        dA, dB = 6 / rank * full @ np.swapaxes(B, -1, -2), 6 / rank * np.swapaxes(A, -1, -2) @ full
        assert relative(found[f"{layer}.lora_A.kernel"], dA) < 1e-5, name
        assert relative(found[f"{layer}.lora_B.kernel"].reshape(rank, -1), dB.reshape(-1, *dB.shape[-2:]).sum(0)) < 1e-5


def test_other_parameters_and_other_networks_are_completed_too():
    """A discriminator's head stands among a score's adapters; frozen["fake"] holds adapters of frozen["real"]."""
    params = random_adapters(ADAPTERS, WEIGHTS)
    seen = {}

    def record(params, frozen, batch, key):
        seen.update(params=params, fake=frozen["fake"])
        return jnp.float32(0), {}

    frozen = {BASE: WEIGHTS, "real": WEIGHTS, "fake": params}
    lora.adapt(record, 6.0, BASE, {"fake": "real"})(params | {"head.kernel": BATCH["X"]}, frozen, {}, None)
    merged = lora.merge(WEIGHTS, params, 6.0)
    assert seen["params"].keys() == {*WEIGHTS, "head.kernel"} and seen["fake"].keys() == WEIGHTS.keys()
    for name, value in merged.items():
        np.testing.assert_array_equal(seen["params"][name], value)
        np.testing.assert_array_equal(seen["fake"][name], value)


@pytest.mark.slow
def test_four_devices_equal_one():
    """In a process of its own, which compares them."""
    script = Path(toy_lora.__file__)
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "PYTHONPATH": str(script.parents[1])}
    done = subprocess.run([sys.executable, script], env=os.environ | flags, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- the stages

FIELDS = {"rank": 2, "alpha": 6.0, "ranks": ("to_q=3",)}


def configured(config, **fields):
    """With a rate that moves the adapters far in a few steps."""
    config.lora.update(FIELDS)
    config.schedule.peak = 0.03
    config.update_from_flattened_dict(fields)
    return config


def reflow(teacher, **fields):
    return configured(reflow_config(teacher), warm_start=False, **fields)


def saved(run, item="ema"):
    mesh = devices.make_mesh(fsdp=1)
    return jax.device_get(checkpoint.load_weights(run / "checkpoints", item, mesh, step=None, like=None))


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


def unet(folder):
    return UNet2DConditionModel.from_pretrained(folder, "unet")[1]


@pytest.fixture(scope="module")
def run(only_training, teacher, tmp_path_factory):
    """`reflow` of adapters, killed in its third step and continued, in a workdir."""
    workdir = tmp_path_factory.mktemp("run")
    with killed_at(3):
        main.run(reflow(teacher), str(workdir))
    assert not (workdir / "reflow" / "export").exists()
    main.run(reflow(teacher), str(workdir))
    return workdir


@pytest.mark.slow
def test_a_killed_run_ends_the_same(run, teacher, tmp_path):
    shutil.copytree(run / "pairs", tmp_path / "pairs")
    main.run(reflow(teacher), str(tmp_path))
    for item in ("params", "ema", "optimizer"):
        assert_same(*(saved(workdir / "reflow", item) for workdir in (tmp_path, run)))


@pytest.mark.slow
def test_checkpoints_hold_adapters_and_the_export_the_merged_model(run, teacher):
    before, after, ema = unet(teacher), unet(run / "reflow" / "export"), saved(run / "reflow")
    ranks = {name.rpartition(".lora_")[0]: value.shape[-1] for name, value in ema.items() if ".lora_A." in name}
    assert len(ema) == 2 * len(ranks) and {name.rpartition(".")[2]: rank for name, rank in ranks.items()} == {
        **dict.fromkeys(("to_k", "to_v", "0"), 2),
        "to_q": 3,
    }
    assert all(".lora_" in name or name.count(".") < 3 for name in saved(run / "reflow", "optimizer"))
    changed = {name.removesuffix(".kernel") for name, value in after.items() if not np.array_equal(value, before[name])}
    assert changed == ranks.keys()
    assert_same(after, lora.merge(before, ema, 6.0))


@pytest.mark.slow
def test_a_run_is_not_continued_with_other_adapters_or_of_another_model(run, teacher, tmp_path, monkeypatch):
    other = shutil.copytree(teacher, tmp_path / "other")
    path = other / "unet" / "diffusion_pytorch_model.safetensors"
    weights = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file(weights | {"conv_in.bias": weights["conv_in.bias"] + 1}, path)
    replaced = reflow(teacher)
    replaced.model = replaced.pairs.model = str(other)
    config = checkpoint.load_config(run / "reflow" / "checkpoints", step=None)
    assert config["lora"]["base"]["model"] == str(teacher) and config["lora"]["base"]["within"] == ""
    for fields, words in (
        ({"lora.rank": 4}, "lora.rank=4, there 2"),
        ({"lora.alpha": 3.0}, "lora.alpha=3.0, there 6.0"),
        ({"lora.targets": ("to_q",)}, "lora.targets="),
        ({"lora.rank": None, "lora.alpha": None, "lora.ranks": ()}, "lora.rank=None, there 2"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            main.run(reflow(teacher, **fields), str(run))
    options = flow_training.read_flow_options(replaced)
    with pytest.raises(ValueError, match=r"trains adapters of other weights .*, not adapters of the present weights"):
        adapters.with_base(options.train, run / "reflow", str(other), {BASE: unet(other)})
    with pytest.raises(ValueError, match="whose weights have changed since"):
        adapters.check_base(run / "reflow", config, unet(other))
    monkeypatch.setattr(adapters.checkpoint, "load_config", lambda *_, **__: {"stage": "reflow"})  # of an older version
    with pytest.raises(ValueError, match="holds a run that trains all weights, not adapters"):
        adapters.with_base(options.train, run / "reflow", str(teacher), {BASE: unet(teacher)})


@pytest.mark.slow
def test_distillation_of_adapters_follows_its_base_in_a_moved_workdir(run, teacher, tmp_path):
    workdir = shutil.copytree(run, tmp_path / "before")
    config = configured(distill_config(teacher))
    main.run(config, str(workdir))
    moved = workdir.rename(tmp_path / "moved")
    source = export_source.load(str(moved / "distill"), "ema", "auto", loading.WeightOptions())
    assert source.adapters.base == str(workdir / "reflow" / "export") and not source.adapters.is_converted
    want = lora.merge(unet(moved / "reflow" / "export"), saved(moved / "distill"), 6.0)
    assert_same(source.pipe.params["unet"], want)
    assert_same(unet(moved / "distill" / "export"), want)


@pytest.mark.slow
def test_refinement_trains_adapters_of_both_networks(run, teacher, tmp_path):
    workdir = shutil.copytree(run, tmp_path / "run")
    config = configured(refine_config(teacher), real=str(run / "reflow" / "export"))
    main.run(config, str(workdir))
    rest = saved(workdir / "refine", "optimizer")
    fake = [name for name in rest if name.startswith("fake.params.")]
    assert any(name.startswith("fake.params.head.") for name in fake)
    assert all(".lora_" in name or ".head." in name for name in fake)
    assert {name.removeprefix("fake.params.") for name in fake if ".lora_" in name} == saved(workdir / "refine").keys()
    before, after = unet(workdir / "reflow" / "export"), unet(workdir / "refine" / "export")
    assert_same(after, lora.merge(before, saved(workdir / "refine"), 6.0))
    assert any(np.any(after[name] != value) for name, value in before.items())


@pytest.mark.slow
@pytest.mark.parametrize("shrunk, copies", [(reflow_config, 4), (refine_config, 7)])
def test_the_step_of_adapters_is_planned(shrunk, copies, teacher):
    """The step reads parameters, two moments and the student's average of adapters alone, and frozen weights once."""
    config = configured(shrunk(teacher), batch_size=jax.device_count())
    config.update({"adversarial": 0.0} if "adversarial" in config else {})
    config.update_from_flattened_dict({"fake.adversarial": 0.0} if "fake" in config else {})
    traced = programs.trace(config, str(teacher), jax.devices()).traced
    pipe = load(teacher)
    trained = adapters.shapes(adapters.read_lora(config.lora), pipe.nets["unet"])
    frozen = [pipe.params["text_encoder"], pipe.params["unet"], *([pipe.params["unet"]] if copies == 7 else [])]
    numbers = sum(p.size for params in frozen for p in params.values()) + copies * sum(p.size for p in trained.values())
    assert numbers < sum(leaf.size for leaf in traced.jaxpr.in_avals) < numbers + 1000
    assert programs.fields(config)["lora.rank"] == 2


# ---------------------------------------------------------------- exported files


@pytest.mark.slow
def test_the_export_of_a_run_is_read_back(run, teacher, tmp_path):
    """Each of the two files, merged by `config.loras` into the base, gives the exported model."""
    config = read_config("export")
    config.update({"model": str(run / "reflow"), "formats": ("lora", "orbax", "diffusers"), "convention": "released"})
    main.run(config, str(tmp_path))
    folder = tmp_path / "export"
    card, want = (folder / "README.md").read_text(), unet(folder / "diffusers")
    assert f"They belong to `{teacher}`" in card and "rank 2, alpha 6, `to_q`" in card
    for file in ("pytorch_lora_weights.safetensors", "kohya.safetensors"):
        got = load(teacher, loras=[(str(folder / "lora" / file), 1.0)]).params["unet"]
        for name, value in want.items():
            np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
        assert max(np.abs(got[name] - value).max() for name, value in unet(teacher).items()) > 1e-2


@pytest.mark.slow
def test_adapters_that_no_other_program_could_use_are_not_exported(run, teacher, tmp_path):
    config = read_config("export")
    config.update({"model": str(run / "reflow" / "export"), "formats": ("lora",)})
    with pytest.raises(ValueError, match=r"is not a run that trained adapters .*leave it out of config\.formats"):
        main.run(config, str(tmp_path))
    source = export_source.load(str(run / "reflow"), "params", "auto", loading.WeightOptions())
    warm = dataclasses.replace(source, adapters=dataclasses.replace(source.adapters, is_converted=True))
    with pytest.raises(ValueError, match=r"warm start or a Stacked U-Net.*leave 'lora' out"):
        export_stage.check_formats(Options(("lora",), "stock", "", "float32"), warm)
    assert not list(tmp_path.iterdir())


TARGETS = ("to_q", "to_out.0", "ff.net.0.proj", "proj_in", "conv1", "downsamplers.0.conv", "time_emb_proj", "conv_out")


@pytest.mark.slow
def test_what_diffusers_makes_of_the_files_equals_ours(torch, tmp_path):
    """SD 1.x' layout, every kind of layer, several ranks; as a flow in both conventions, at 1e-5."""
    from diffusers import StableDiffusionPipeline

    make_directory(tmp_path / "base", "flat")
    pipe, alpha = load(tmp_path / "base"), 6.0
    net, start = pipe.nets["unet"], pipe.params["unet"]
    params = random_adapters(Lora(3, alpha, TARGETS, (("conv1", 2), ("to_q", 5))), start)
    Z, text, t = normal(1, 2, 8, 8, 4), normal(2, 2, 7, 16), np.array([1000.0, 400.0], np.float32)
    apply = jax.jit(net.apply)
    v = apply(lora.merge(start, params, alpha), Z, t, text)
    assert relative(v, apply(start, Z, t, text)) > 0.1
    found = export_source.Adapters(lora.to_layers(params, alpha), "base", False)
    base = export_source.Source("base", pipe, sampling.Flow(1, 1000), {}, None)
    for convention, factor in (("released", 1), ("stock", -1001 / 1000)):
        options = export_formats.Options(("lora",), convention, "", "float32")
        export_formats.write_diffusers(base, tmp_path / convention, options)
        export_formats.write_lora(dataclasses.replace(base, adapters=found), tmp_path / convention / "lora", options)
        theirs = StableDiffusionPipeline.from_pretrained(tmp_path / convention)
        for file in ("pytorch_lora_weights.safetensors", "kohya.safetensors"):
            theirs.load_lora_weights(tmp_path / convention / "lora", weight_name=file)
            with torch.no_grad():
                inputs = torch.tensor(Z.transpose(0, 3, 1, 2)), torch.tensor(t), torch.tensor(text)
                got = theirs.unet(*inputs).sample.numpy().transpose(0, 2, 3, 1)
            print(f"{convention}, {file}: relative difference {relative(got, factor * np.asarray(v)):.1e}")
            assert relative(got, factor * np.asarray(v)) < 1e-5
            theirs.unload_lora_weights()
