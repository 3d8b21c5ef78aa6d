"""Stage `plan`: the programs of the stages, their FLOPs and pairs, the refusals, and plans for a real TPU compiler."""

import dataclasses
import importlib.util
import json
import runpy

import jax
import jax.numpy as jnp
import pytest
import toy_training as toy
from helpers import ROOT, read_config

from instaflow_jax import main
from instaflow_jax.infra import collectives, cost, devices
from instaflow_jax.models import layers
from instaflow_jax.models.unet import UNet2DConditionModel
from instaflow_jax.stages.plan import programs, shapes, stage, targets
from instaflow_jax.train import loop, state, step

PROGRAMS = ("sample_openmoji", "generate_openmoji", "reflow_openmoji", "distill_openmoji", "distill_lpips")
PROGRAMS += ("progressive_openmoji", "refine_openmoji")


def configured(variant, **fields):
    config = read_config("plan", variant).unlock()
    config.update_from_flattened_dict(fields)
    return config.lock()


@pytest.fixture
def compilers(monkeypatch):
    """Both compilers count as installed."""
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: True)


# ---------------------------------------------------------------- FLOPs


@pytest.mark.parametrize("name, tflop", [("unet", 0.803), ("text_encoder", 0.0133)])
def test_flops_of_sd15s_networks(name, tflop):
    """2 × the multiply-adds of one forward pass at 512 pixels."""
    net = shapes.CLASSES[name].from_config(shapes.SD15[name], kernels="xla")
    latent, text = jax.ShapeDtypeStruct((1, 64, 64, 4), jnp.float32), jax.ShapeDtypeStruct((1, 77, 768), jnp.float32)
    inputs = {"unet": (latent, 0, text), "text_encoder": (jax.ShapeDtypeStruct((1, 77), jnp.int32),)}[name]
    assert cost.count_flops(jax.make_jaxpr(net.apply)(net.shapes, *inputs)) / 1e12 == pytest.approx(tflop, rel=0.005)


@pytest.mark.slow
def test_recomputation_is_not_counted():
    config = read_config("reflow").unlock()
    config.batch_size = jax.device_count()
    plain = programs.trace(config, "openmoji", jax.devices())
    config.remat.unet = "blocks"
    again = programs.trace(config, "openmoji", jax.devices())
    assert again.flops == plain.flops
    target = targets.Target("these", jax.devices(), cost.Peak(1e15, 1e12, 1e9), {})
    seconds, longer = (stage.roofline(program, target, accessed=1e9) for program in (plain, again))
    assert seconds["model"] == seconds["compute"] == pytest.approx(plain.flops / (1e15 * jax.device_count()))
    assert seconds["bound"] == seconds["memory"] == 1e-3
    assert longer["model"] == seconds["model"] and longer["compute"] > 1.1 * seconds["compute"]
    assert layers.Remat.allowed


@pytest.mark.slow
def test_flops_of_a_step_are_those_that_xla_counts():
    """On shapes for which the CPU has no kernels of its own; XLA also counts additions, activations and norms."""
    net = UNet2DConditionModel.from_config(
        {
            "sample_size": 8,
            "block_out_channels": (64, 64),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "layers_per_block": 1,
            "cross_attention_dim": 64,
            "attention_head_dim": 2,
            "norm_num_groups": 8,
        },
        kernels="xla",
    )
    inputs = net.shapes, jnp.zeros((2, 8, 8, 4)), jnp.zeros(2), jnp.zeros((2, 7, 64))
    gradient = jax.grad(lambda *x: jnp.mean(net.apply(*x) ** 2))
    ours = cost.count_flops(jax.make_jaxpr(gradient)(*inputs))
    assert ours == pytest.approx(jax.jit(gradient).lower(*inputs).cost_analysis()["flops"], rel=0.1)


# ---------------------------------------------------------------- programs


@pytest.mark.slow
@pytest.mark.parametrize("variant", PROGRAMS)
def test_the_programs_of_the_stages_are_traced_from_shapes(variant):
    config = configured(variant).program.copy_and_resolve_references().unlock()
    if "batch_size" in config:
        config.batch_size = jax.device_count()
    program = programs.trace(config, "openmoji", jax.devices())
    assert isinstance(program.traced, jax.stages.Traced) and program.flops > 1e8
    expected = {"sample": 1, "generate": -(-4096 // program.rows), "reflow": 1500, "distill": 900}
    expected |= {"progressive": 800, "refine": read_config("refine").loop.steps}
    assert program.calls == (400 if variant == "distill_lpips" else expected[config.stage])


def test_planned_pairs_match_the_disk():
    """4,096 pairs of the demo take 12,582,912 bytes."""
    config = configured("generate_openmoji").program
    assert stage.pair_bytes(config, "openmoji") == pytest.approx(12_582_912, rel=0.01)


# ---------------------------------------------------------------- targets and refusals


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"target": "v5e-3"}, "config.target='v5e-3' is not one of v4-1"),
        ({"target": "h300-8"}, "is not one of"),
        ({"program.dtype": "int8"}, "config.dtype='int8' is not one of"),
        ({"program.remat.unet": "all"}, "config.remat.unet='all'"),
        (
            {"shapes": "nowhere"},
            "config.shapes='nowhere' is neither 'sd15', 'sd15_stacked', an embedded model nor a directory",
        ),
        ({"optimization_level": "fast"}, "config.optimization_level='fast' is not one of UNKNOWN, O0, O1, O2, O3"),
    ],
)
def test_wrong_settings_end_in_one_line_and_write_nothing(fields, words, compilers, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError)) as raised:
        main.run(configured("reflow_openmoji", **fields), str(tmp_path))
    assert words in str(raised.value) and "\n" not in str(raised.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("target, extra", [("v5e-4", "plan-tpu"), ("h100-8", "gpu")])
def test_a_missing_compiler_is_one_line_that_names_the_extra(target, extra, monkeypatch):
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf"pip install -e '.\[{extra}\]'"):
        targets.check(target)


def test_variants_name_a_stage_and_its_variant():
    get_config = runpy.run_path(str(ROOT / "configs" / "plan.py"))["get_config"]
    assert get_config("distill_sd15_lpips").program.distance == "lpips"
    assert get_config("generate_rf2").shapes == "sd15" and get_config("sample_instaflow").shapes == "sd15"
    assert get_config("reflow_diffusion").shapes == get_config("distill_consistency").shapes == "openmoji"
    stacked = get_config("distill_sd15_stacked_l2")
    assert stacked.program.stacked.enabled and stacked.program.loop.steps == 110_000 and stacked.shapes == "sd15"
    for wrong in ("reflow", "evaluate_openmoji", "reflow_sd14"):
        with pytest.raises(ValueError, match="no variant"):
            get_config(wrong)


def test_what_a_refusal_needs_is_read():
    message = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 22.36G of 15.75G hbm."
    assert stage.refused_bytes(message) == int(22.36 * 2**30) and stage.refused_bytes("no figure") == 0


def test_a_program_whose_text_cannot_be_read_is_planned(capsys):
    def refuse(text):
        raise ValueError("a loop has an unknown trip count: while.1")

    assert stage.count("its memory traffic", refuse, "") is None
    assert "its memory traffic is not counted: a loop has an unknown trip count: while.1" in capsys.readouterr().out


def make_plan(*, seconds, rows, fits):
    nothing = {"program": "reflow", "target": "v5e-4", "devices": 4, "fields": {}, "memory": None, "needed": 0}
    nothing |= {"available": 1, "flops": 1.0, "accessed": {}, "sent": {}, "unexpected": [], "unit": "sample"}
    bound = {"model": 0.8 * seconds, "compute": seconds, "memory": 0.0, "bound": seconds}
    return stage.Plan(**nothing, fits=fits, seconds=bound, rows=rows, calls=3600, compile_seconds=1.0)


def test_what_is_not_counted_is_said():
    plan = dataclasses.replace(make_plan(seconds=1.0, rows=1, fits=True), memory=cost.Memory(1, 1, 1))
    assert "reads and writes not counted, sends not counted\n" in stage.summary(plan)
    assert stage.cells(plan).count("–") == 2
    quiet = dataclasses.replace(plan, accessed={"unet": 5e9}, sent={"all-reduce": 0.0})
    assert "reads and writes 5.0 GB a device (unet 100 %), sends nothing\n" in stage.summary(quiet)


def test_the_fastest_plan_that_fits_wins():
    cases = (1.0, 8, True), (2.0, 32, True), (1.0, 64, False)
    slow, fast, large = (make_plan(seconds=seconds, rows=rows, fits=fits) for seconds, rows, fits in cases)
    assert stage.fastest([slow, fast, large]) is fast and stage.fastest([large]) is None
    assert fast.hours == 2.0 and fast.mfu == 0.8
    assert "2 hours, 0.3333 device-days, 20 dollars" in stage.amount(fast, 2.5, 0)


def test_the_search_tries_batches_that_the_devices_can_share():
    config = read_config("reflow", "sd15")
    found = list(stage.search_space(config, 8))
    assert {fields["accumulate"] for fields in found} == {1, 2, 8} and {fields["fsdp"] for fields in found} == {1, 8}
    assert list(stage.search_space(read_config("sample"), 8)) == [{"batch": 1}, {"batch": 4}, {"batch": 16}]


# ---------------------------------------------------------------- the compilers


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the TPU's compiler")
@pytest.mark.parametrize(
    "variant, sends",
    [
        ("sample_openmoji", ()),
        ("generate_openmoji", ()),
        ("reflow_openmoji", ("all-reduce",)),
        ("distill_lpips", ("all-reduce",)),
    ],
)
def test_the_embedded_programs_are_planned_for_a_v5e_4(variant, sends, tmp_path, capsys):
    main.run(configured(variant, target="v5e-4"), str(tmp_path))
    name = f"{variant.split('_')[0]}_v5e-4"
    (plan,) = json.loads((tmp_path / "plan" / f"{name}.json").read_text())["plans"]
    assert plan["fits"] and 2**20 < plan["memory"]["arguments"] < plan["needed"] < 2**30
    assert {operation for operation, size in plan["sent"].items() if size} == set(sends) and not plan["unexpected"]
    assert sum(plan["accessed"].values()) > 1e8 and "kernels/convolution" in plan["accessed"]
    assert plan["seconds"]["memory"] > plan["seconds"]["compute"] > 0
    assert "| v5e-4 | " in (tmp_path / "plan" / f"{name}.md").read_text()
    assert "  fits: 0." in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the TPU's compiler")
@pytest.mark.parametrize("fsdp", [1, 4])
def test_a_tpus_compiler_gathers_and_sums_once_a_step_at_full_effort(fsdp):
    mesh = devices.make_mesh(fsdp=fsdp, devices=targets.find("v5e-4").devices)
    update = step.make_train_step(toy.quiet_loss, toy.optimizer(), mesh, ema_decay=0.9, accumulate=4)
    start = jax.eval_shape(lambda key: state.create(toy.params(key), toy.optimizer()), jax.random.key(0))
    batch = devices.abstract_batch(toy.source().spec(), mesh)
    key = devices.with_sharding(jax.eval_shape(lambda: jax.random.key(0)), devices.replicated(mesh))
    frozen = devices.with_sharding(toy.frozen(), devices.replicated(mesh))
    traced = loop.trace_step(update, devices.abstract(start, mesh), frozen, batch, key, mesh)
    with stage.optimizing("UNKNOWN"):
        found = collectives.read(traced.lower().compile().as_text())
    sharded = [p.shape for p in devices.abstract(start, mesh).params.values() if not p.sharding.is_fully_replicated]
    assert found and not collectives.unexpected(found, sharded, sums=1)
