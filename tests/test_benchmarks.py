"""The benchmark harness: the table's arithmetic, two processes in turn, and both sides computing the same."""

import dataclasses
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import references, relative

from benchmarks import peers, plans, run, sd15, table, timing, training, twins
from benchmarks.sizes import DRY
from benchmarks.timing import Row, Side, Spec, Timing
from configs import plan as plan_config
from instaflow_jax import flow, pipeline
from instaflow_jax.models.lpips import LPIPS

OURS, THEIRS = (
    Timing(9.0, (2.0, 1.0, 4.0), (3.0, 4.0, 3.5), 2**30, 4, 8e9),
    Timing(0.5, (5.0, 5.0, 6.0), (7.0, 7.0, 9.0), 2**31, 4),
)
ROW = Row("a step", "somebody", OURS, THEIRS)
TINY = {name: DRY.configs[name] for name in ("unet", "vae", "text_encoder")}
SIZE = {"configs": TINY, "latent": 8, "batches": [2], "steps": 1, "dtype": "float32"}


def test_medians_ratio_and_spread():
    assert (OURS.median, THEIRS.median, ROW.ratio) == (2.0, 5.0, 2.5)
    assert OURS.spread == 1.5 and THEIRS.spread == pytest.approx(0.2)


def test_a_row_shows_every_number():
    cells = table.cells(ROW)
    assert cells == [
        "a step",
        "2 s (2/s)",
        "somebody",
        "5 s (0.8/s)",
        "2.50",
        "3.5 / 7 (2.00)",
        "150% / 20%",
        "4",
        "1.00 / 2.00",
        "9 s / 500 ms",
    ]
    assert table.cells(dataclasses.replace(ROW, ours=dataclasses.replace(OURS, flops=0.0)))[7] == "–"


def test_the_table_names_machine_and_versions():
    lines = table.render([ROW], "cpu", 3).splitlines()
    assert "cores" in lines[0] and f"jax {jax.__version__}" in lines[0] and "Suite cpu" in lines[0]
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 3 and len({line.count("|") for line in rows}) == 1


@pytest.mark.slow
def test_sides_take_turns_and_keep_their_own_memory(tmp_path):
    log = tmp_path / "log"
    with (
        Side(Spec("fake_benchmark", "fake", {"memory": 2**26, "done": str(log)})) as ours,
        Side(Spec("fake_benchmark", "fake", {"memory": 2**28, "done": str(log)})) as theirs,
    ):
        rows = timing.compare(ours, theirs, "the other", 2)
    assert [row.title for row in rows] == ["work"]  # what only one side has is left out
    assert log.read_text().split() == [str(2**26), str(2**28)] * 3  # a first run and two repeats, in turn
    ours, theirs = rows[0].ours, rows[0].theirs
    assert len(ours.seconds) == 2 and (ours.count, ours.flops) == (3, 1e6)
    assert 2**27 < theirs.peak - ours.peak < 2**28


@pytest.mark.slow
def test_a_peer_that_fails_is_reported_and_the_rest_goes_on(capfd):
    group = run.Group(
        Spec("fake_benchmark", "fake", {"memory": 8}),
        {"broken": Spec("fake_benchmark", "failing"), "working": Spec("fake_benchmark", "fake", {"memory": 9})},
    )
    rows, failed = run.measure("some", group, 1)
    assert [row.peer for row in rows] == ["working"]
    assert failed == ["some: broken ended early"]
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_a_new_process_is_timed_with_its_memory():
    import sys

    call = timing.process(
        [sys.executable, "-c", "import os; assert os.environ['WANTED'] == '1'; b = bytes(2**27)"], {"WANTED": "1"}
    )
    start = time.perf_counter()
    call.run()
    assert time.perf_counter() > start and call.memory() > 2**27
    with pytest.raises(RuntimeError, match="ended with 3"):
        timing.process([sys.executable, "-c", "raise SystemExit(3)"], {}).run()


def test_groups_are_chosen_by_name():
    groups = run.cpu(compiled=False)
    assert list(run.choose(groups, "flax,sd15")) == ["flax", "sd15"] and run.choose(groups, "") == groups
    with pytest.raises(ValueError, match="--only=sd16: sd16 is not one of sd15"):
        run.choose(groups, "sd16")
    for suite in (run.cpu(compiled=True), run.gpu(compiled=True)):
        for spec in (spec for group in suite.values() for spec in (group.ours, *group.peers.values())):
            assert (Path(run.__file__).parent / f"{spec.module.split('.')[1]}.py").is_file()


def test_the_teachers_image_is_added_up_from_its_parts():
    rows = [
        Row(title, "PyTorch eager", Timing(0, (ours,), (ours,), 0), Timing(0, (theirs,), (theirs,), 0))
        for title, ours, theirs in (
            ("CLIP text", 1.0, 2.0),
            ("1 guided teacher step", 2.0, 3.0),
            ("VAE decoder", 9.0, 3.0),
        )
    ]
    assert "ours 60 s, PyTorch eager 80 s, ratio 1.33" in run.teacher_image(rows)
    assert run.teacher_image(rows[1:]) == ""


@pytest.mark.slow
def test_every_call_of_inference_runs_on_both_sides():
    references()
    flops = dict.fromkeys(TINY, 1.0)
    ours = sd15.ours(flops=flops, attention="xla", **SIZE)
    torch = references()
    try:
        theirs = peers.pytorch(device="cpu", compiled=False, **SIZE)
        assert list(ours) == list(theirs)
        assert (
            ours["one-step image, batch 2"].run().shape == theirs["one-step image, batch 2"].run().shape == (2, 8, 8, 3)
        )
        assert ours["1 guided teacher step"].run().shape == (1, 8, 8, 4)
        assert theirs["1 guided teacher step"].run().shape == (1, 4, 8, 8)
    finally:
        torch.set_grad_enabled(True)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 2])
def test_the_old_flax_classes_run_every_call_too(steps):
    size = {"configs": TINY, "latent": 8, "batches": [2], "steps": steps}
    theirs = peers.flax(**size)
    assert list(theirs) == list(sd15.ours(flops=dict.fromkeys(TINY, 1.0), attention="xla", dtype="float32", **size))
    assert theirs["CLIP text"].run().shape == (1, 5, 16)
    image, solved = (theirs[name].run() for name in ("one-step image, batch 2", list(theirs)[-1]))
    assert image.shape == (2, 3, 8, 8) and image.dtype == np.uint8 and np.ptp(np.asarray(image)) > 0
    assert solved.shape == (1, 4, 8, 8) and np.isfinite(solved).all()


@pytest.mark.slow
def test_the_twin_computes_the_same_losses():
    torch = references()
    pipe = pipeline.load("openmoji", variant=None, attention="xla")
    batch, (unet, text, _) = training.pairs(4, pipe.latent_shape, 16), twins.load()
    pairs = twins.random_pairs(4, twins.latent_shape(unet), 16)
    t = np.linspace(0.1, 0.9, 4).astype(np.float32)

    context = pipe.nets["text_encoder"].apply(pipe.params["text_encoder"], batch["ids"]).last_hidden_state
    v = jax.jit(pipe.nets["unet"].apply)(
        pipe.params["unet"], flow.interpolate(batch["X0"], batch["X1"], t), flow.timestep(jnp.asarray(t)), context
    )
    want = jnp.mean((v - (batch["X1"] - batch["X0"])) ** 2)
    assert (
        relative(want, twins.reflow_loss(unet, text, pairs, torch.tensor(t), torch.zeros(1, 16, dtype=int), 0.0)) < 1e-5
    )

    lpips, params = LPIPS.from_pretrained(pipeline.locate("openmoji"), "lpips")
    a, b = (np.tanh(batch[name][..., :3]).repeat(4, 1).repeat(4, 2) for name in ("X0", "X1"))
    theirs = twins.load_lpips()(*(torch.tensor(x.transpose(0, 3, 1, 2)) for x in (a, b)))
    assert relative(jax.jit(lpips.apply)(params, a, b), theirs) < 1e-5


# ---------------------------------------------------------------- plans


def test_the_recipes_table_adds_up_what_its_plans_say(tmp_path):
    rows = plans.recipe("h100-8", per_device=8, lpips=4)[:2]
    for row, days in zip(rows, (2.0, 3.0), strict=True):
        path = plans.path(row, tmp_path)
        path.parent.mkdir(parents=True)
        plan = {"calls": 10, "hours": 3 * days, "device_days": days, "fits": True, "available": 80 * 2**30}
        plan |= {"memory": {"arguments": 2**30, "temporaries": 2**31}, "seconds": {"bound": 0.5}, "mfu_bound": 0.5}
        path.write_text(json.dumps({"plans": [plan | {"compile_seconds": 60.0}]}))
    assert "| together | h100-8 |  | 15 | 5 | 300 |" in plans.recipe_table(rows, tmp_path)
    assert "| yes, of 80 | 1.00 | 2.00 | 500 ms | 50 % | 60 s |" in plans.table(rows, tmp_path)
    assert plans.table(plans.ROWS[:1], tmp_path).count("\n") == 2  # a row that is not there is left out


def test_every_row_of_the_plans_can_be_planned():
    for row in plans.ROWS:
        config = plan_config.get_config(row.variant).program.copy_and_resolve_references().unlock()
        fields = dict(field.split("=") for field in row.fields)
        config.update_from_flattened_dict({k: int(v) for k, v in fields.items() if v.isdigit()})
        if "batch_size" in config:
            devices = int(row.target.rpartition("-")[2])
            assert config.batch_size % (config.accumulate * devices) == 0 and devices % config.fsdp == 0, row.name
