"""Stage `evaluate` on a tiny random teacher: its programs, its judge, and what it writes in a first and second run."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import EMOJI_NAMES, make_emoji, make_tiny, normal, read_config, relative, shrink_evaluate

from instaflow_jax import flow, main, pipeline, sampling, solvers, teacher
from instaflow_jax.data.openmoji import dataset as openmoji
from instaflow_jax.data.openmoji.captions import Emoji
from instaflow_jax.evals.clip_score import make_clip_score
from instaflow_jax.infra import images
from instaflow_jax.infra.images import to_pixels
from instaflow_jax.models.clip import CLIPModel
from instaflow_jax.stages.common import flow_training
from instaflow_jax.stages.evaluate import models as evaluate_models
from instaflow_jax.stages.evaluate import path as evaluate_path
from instaflow_jax.stages.evaluate import programs as evaluate_programs
from instaflow_jax.stages.evaluate import stage as evaluate
from instaflow_jax.stages.evaluate.judge import Judge, lookalikes
from instaflow_jax.stages.evaluate.models import Model
from instaflow_jax.weights.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("fast_compilation")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"))


def configured(tiny, **fields):
    config = shrink_evaluate(read_config("evaluate"), tiny)
    config.teacher.alpha = 2.0
    config.update(fields)
    return config


@pytest.fixture(scope="module")
def run(tiny, no_drawing, tmp_path_factory):
    """A workdir with teacher, 2-RF and a one-step model, evaluated."""
    workdir = tmp_path_factory.mktemp("run")
    pipe = pipeline.load(str(tiny), variant=None, attention="xla")
    for seed, name in enumerate(("reflow", "distill"), 5):
        unet = jax.device_get(pipe.nets["unet"].init(jax.random.key(seed)))
        flow_training.export(pipe, unet, workdir / name / "export")
    main.run(configured(tiny), str(workdir))
    return workdir


def results(workdir):
    return json.loads((workdir / "evaluate" / "results.json").read_text())


# ---------------------------------------------------------------- the stage


@pytest.mark.slow
def test_it_writes_table_numbers_and_figures(run):
    found = results(run)
    rows = {(row["model"], row["N"]): row for row in found["rows"]}
    assert list(rows) == [
        ("real", 0),
        ("decoded", 0),
        ("teacher", 3),
        ("teacher", 1),
        ("reflow", 2),
        ("reflow", 1),
        ("distill", 1),
    ]
    for (model, N), row in rows.items():
        keys = ["fd_emoji", "fd_kinds", "fd_teacher", "clip_score", "found", "kid", "precision", "recall"]
        keys += ["diversity", "fd_trunk", "fd_trunk_kinds"]
        assert all(np.isfinite(row[key]) for key in keys + (["seconds", "fd_latents", "error_names"] if N else [])), row
        assert ("S" in row) == ((model, N) in (("teacher", 3), ("reflow", 2), ("distill", 1)))
    assert rows["real", 0]["found"] == 1.0
    assert (
        rows["teacher", 3]["error_names"] == rows["teacher", 3]["error_kinds"] == 0 < rows["teacher", 1]["error_kinds"]
    )
    assert [row["alpha"] for row in found["guidance"]] == [1.0, 2.0]
    table = (run / "evaluate" / "table.md").read_text()
    assert all(words in table for words in ("teacher, 3 steps", "reflow + distil, 1 step", "8 prompts", "guidance 2"))


@pytest.mark.slow
def test_the_figures_show_models_side_by_side_from_the_same_noise(run):
    text = images.load_png(run / "evaluate" / "grid.png")[1]
    assert text["columns"] == "teacher, 3|teacher, 1|2-RF, 2|2-RF, 1|reflow + distil, 1"
    assert text["rows"] == "red apple|house"
    paths, text = images.load_png(run / "evaluate" / "trajectories.png")
    assert text["rows"].count("on the way") == 3 and text["columns"] == "t = 0.0|t = 0.5|t = 1.0"
    starts = [paths[16 + row * 98 : 16 + row * 98 + 96, -2 * 98 - 96 : -2 * 98] for row in (0, 2, 4)]
    assert np.array_equal(starts[0], starts[1]) and np.array_equal(starts[1], starts[2])
    for name in ("few_steps.png", "guidance.png"):
        assert images.load_png(run / "evaluate" / name)[0].shape[2] == 3


@pytest.mark.slow
def test_a_second_run_measures_only_what_is_new(run, tiny, no_drawing, tmp_path, monkeypatch, capsys):
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    drawn, draw = [], evaluate_programs.Programs.draw

    def counted(self, model, table, *rest):
        drawn.append(len(table.tau))
        return draw(self, model, table, *rest)

    monkeypatch.setattr(evaluate_programs.Programs, "draw", counted)
    main.run(configured(tiny), str(copy))
    assert drawn == [] and results(copy) == results(run)
    assert "measured before" in capsys.readouterr().out
    config = configured(tiny)
    config.reflow.N = (2, 1, 3)
    main.run(config, str(copy))
    assert drawn == [3]


@pytest.mark.slow
def test_extra_folders_are_evaluated_like_distill(run, tiny, no_drawing, tmp_path):
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    shutil.copytree(copy / "distill", copy / "distill300")
    main.run(configured(tiny, extra="distill300"), str(copy))
    rows = {row["model"]: row for row in results(copy)["rows"]}
    assert rows["distill300"] == rows["distill"] | {"model": "distill300", "title": "distill300"}
    assert images.load_png(copy / "evaluate" / "grid.png")[1]["columns"].endswith("reflow + distil, 1|distill300, 1")
    assert "distill300, 1 step" in (copy / "evaluate" / "table.md").read_text()


@pytest.mark.slow
def test_later_reflows_and_rounds_of_progressive_distillation_are_rows(run, tiny, no_drawing, tmp_path):
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    made = (("reflow", "reflow_3"), *(("distill", name) for name in ("progressive_1", "progressive_2", "consistency")))
    for source, name in made:
        shutil.copytree(copy / source, copy / name)
    (copy / "reflow_10").mkdir()  # not trained yet
    main.run(configured(tiny), str(copy))
    rows = {(row["model"], row["N"]): row for row in results(copy)["rows"]}
    assert [key for key in rows if key[1]][2:] == [
        *(("reflow", 2), ("reflow", 1), ("reflow_3", 2), ("reflow_3", 1), ("distill", 1)),
        ("consistency", 1),
        *(("progressive_2", 2), ("progressive_1", 1)),
    ]
    assert rows["reflow_3", 2] == rows["reflow", 2] | {"model": "reflow_3", "title": "3-RF"}
    assert rows["progressive_1", 1] == rows["distill", 1] | {"model": "progressive_1", "title": "progressive"}
    columns = images.load_png(copy / "evaluate" / "grid.png")[1]["columns"]
    assert columns.endswith("3-RF, 2|3-RF, 1|reflow + distil, 1|reflow + consistency, 1|progressive, 1")
    assert images.load_png(copy / "evaluate" / "straightness.png")[0].shape[2] == 3
    with pytest.raises(ValueError, match="'reflow_3' is empty, repeated, or one of"):
        evaluate_models.split_extra("reflow_3")


@pytest.mark.slow
def test_the_teacher_alone_gives_a_table_too(tiny, no_drawing, tmp_path, capsys):
    main.run(configured(tiny), str(tmp_path))
    assert {row["model"] for row in results(tmp_path)["rows"]} == {"real", "decoded", "teacher"}
    assert "goes without 2-RF" in capsys.readouterr().out
    assert not (tmp_path / "evaluate" / "guidance.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "change,error,words",
    [
        (lambda config: config.update({"count": 99}), ValueError, "config.count=99 must be from 2 to 18"),
        (lambda config: config.update({"batch": 0}), ValueError, "config.batch=0 must be at least 1"),
        (lambda config: config.reflow.update({"N": (0,)}), ValueError, "config.reflow.N=(0,) must be"),
        (lambda config: config.show.update({"points": 1}), ValueError, "config.show.points=1"),
        (
            lambda config: config.update({"extra": "mine|direct"}),
            ValueError,
            "config.extra='mine|direct': 'direct' is empty, repeated",
        ),
        (lambda config: config.update({"extra": "mine|mine"}), ValueError, "config.extra='mine|mine': 'mine' is"),
        (lambda config: config.update({"extra": "mine"}), FileNotFoundError, "holds no model; train it with"),
        (lambda config: config.teacher.update({"alpha": 0.0}), FileNotFoundError, "set --config.teacher.alpha"),
    ],
)
def test_bad_settings_raise_one_clear_message(change, error, words, tiny, no_drawing, tmp_path):
    config = configured(tiny)
    change(config)
    with pytest.raises(error) as raised:
        main.run(config, str(tmp_path))
    assert words in str(raised.value)
    assert not (tmp_path / "evaluate" / "results.json").exists()


@pytest.mark.slow
def test_noise_that_was_trained_on_is_refused(tiny, no_drawing, tmp_path):
    pairs = read_config("generate")
    pairs.update({"model": str(tiny), "count": 4, "shard_size": 4, "batch": 4, "N": 1, "seed": 102, "preview": 1})
    main.run(pairs, str(tmp_path))
    with pytest.raises(ValueError, match=r"config\.seed=101 and the two seeds after it must not be 102"):
        main.run(configured(tiny), str(tmp_path))


@pytest.mark.slow
def test_a_flow_with_other_networks_is_refused(run, tiny, no_drawing, tmp_path):
    copy = Path(shutil.copytree(run / "reflow", tmp_path / "reflow"))
    path = copy / "export" / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"norm_num_groups": 2}))
    (copy / "export" / "checksums.json").unlink()
    with pytest.raises(ValueError, match="unet differs from the teacher's network"):
        main.run(configured(tiny), str(tmp_path))


@pytest.mark.slow
def test_a_stacked_unet_is_compared_with_its_teacher(tiny, tmp_path):
    pipe = pipeline.load(str(tiny), variant=None, attention="xla")
    flow_pipe = flow_training.as_flow(pipe, pipe.params["unet"])
    pipeline.save(pipeline.stack(flow_pipe, flow_pipe, middle_norm=True), tmp_path)
    entries = [evaluate_models.Entry(source.name, str(source), 1.0, (1,)) for source in (tiny, tmp_path)]
    teacher, stacked = evaluate_models.load(entries)
    assert stacked.pipe.nets["unet"].config != teacher.pipe.nets["unet"].config == stacked.pipe.nets["unet"].config.half


def test_variants_are_the_papers_protocols():
    assert all(read_config("evaluate", name).stage == "evaluate_coco" for name in ("coco5k", "coco30k"))
    with pytest.raises(ValueError, match="no variant 'coco'; it has openmoji, coco5k, coco30k"):
        read_config("evaluate", "coco")


# ---------------------------------------------------------------- programs


@pytest.fixture(scope="module")
def models(tiny):
    pipe = pipeline.load(str(tiny), variant=None, attention="xla")
    dynamics = {"teacher": sampling.read_dynamics(pipe.scheduler, pipe.index, "auto"), "reflow": sampling.Flow(1, 1000)}
    return {name: Model(name, pipe, dynamic, 2.0, (3,), "") for name, dynamic in dynamics.items()}


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [1.0, 2.0])
@pytest.mark.parametrize("name,counts", [("teacher", (1, 2, 5)), ("reflow", (1, 4))])
def test_programs_draw_what_sampling_draws(name, counts, alpha, models):
    """Six rows in calls of four, by one program whatever N and alpha."""
    model = models[name]
    pipe, null = model.pipe, model.pipe.tokenizer([""])
    programs = evaluate_programs.Programs(pipe.nets, null, per_device=4, longest=8)
    ids, X0 = pipe.tokenizer(list(EMOJI_NAMES[:6])), normal(0, 6, 4, 4, 4)
    both = pipe.nets["text_encoder"].apply(pipe.params["text_encoder"], np.concatenate([null, ids])).last_hidden_state
    for N in counts:
        latents, drawn = programs.draw(model, model.table(N), alpha, ids, X0)
        solve = sampling.make_solve(pipe.nets["unet"].apply, model.dynamics, "auto", N, alpha)
        assert relative(latents, jax.jit(solve)(pipe.params["unet"], X0, both[1:], both[:1])) < 1e-5
        one = programs.draw_one(model, model.table(N), alpha, ids[:1], X0[:1])
        assert np.abs(one.astype(int) - drawn[:1]).max() <= 1


@pytest.mark.slow
def test_a_solver_too_long_for_the_programs_is_refused(models):
    with pytest.raises(ValueError, match="9 steps does not fit into a table of 8"):
        evaluate_programs.make_solver(models["reflow"].table(9), 1.0, 8)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["teacher", "reflow"])
def test_straightness_is_that_of_the_guided_flow(name, models):
    model = models[name]
    pipe, null = model.pipe, model.pipe.tokenizer([""])
    programs = evaluate_programs.Programs(pipe.nets, null, per_device=2, longest=8)
    ids, X0 = pipe.tokenizer(list(EMOJI_NAMES[:2])), normal(0, 2, 4, 4, 4)
    got = programs.straightness(model, 2.0, 3, ids, X0)
    both = pipe.nets["text_encoder"].apply(pipe.params["text_encoder"], np.concatenate([null, ids])).last_hidden_state

    def network(Z, tau, context):
        return pipe.nets["unet"].apply(pipe.params["unet"], Z, tau, context)

    predict = flow.guided(network, both[1:], both[:1], 2.0)
    velocity = (
        teacher.teacher_velocity(predict, model.dynamics)
        if name == "teacher"
        else flow.flow_velocity(network, both[1:], both[:1], 2.0)
    )
    want = jax.jit(lambda X0: flow.straightness(solvers.trajectory(velocity, solvers.euler(3), X0)[1]))(X0)
    np.testing.assert_allclose(got, want, rtol=1e-4)


# ---------------------------------------------------------------- an image on its way


def solve(table, predict, X0):
    """A table without rows, at the very start, gives X0."""
    return np.asarray(solvers.integrate(predict, table, X0))


@pytest.mark.parametrize("N", [1, 4])
def test_a_straight_flow_points_to_its_end_from_everywhere(N, models):
    X0, v = normal(0, 1, 2, 2, 4), normal(1, 1, 2, 2, 4)
    stops = evaluate_path.stops(models["reflow"], N, 6)
    assert [stop.t for stop in stops] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    for stop in stops:
        way, end = (
            solve(make(models["reflow"], N, stop), lambda Z, tau: v, X0)
            for make in (evaluate_path.until, evaluate_path.endpoint)
        )
        np.testing.assert_allclose(way, X0 + stop.t * v, atol=1e-6)
        np.testing.assert_allclose(end, X0 + v, atol=1e-6)


def test_a_teacher_with_one_answer_goes_there_on_a_straight_line(models):
    """Where the data prediction is always X1, Z_t is the straight interpolation (teacher.teacher_velocity)."""
    model, X0, X1 = models["teacher"], normal(0, 1, 2, 2, 4), normal(1, 1, 2, 2, 4)
    alpha, sigma = (
        jnp.sqrt(jnp.asarray(level, jnp.float32)) for level in (model.dynamics.abar, 1 - model.dynamics.abar)
    )

    def predict(x, tau):
        return (x - alpha[tau] * X1) / sigma[tau]

    eps = (X0 - alpha[-1] * X1) / sigma[-1]
    stops = evaluate_path.stops(model, 25, 4)
    assert [stop.t for stop in stops] == pytest.approx([0, 1 / 3, 2 / 3, 1], abs=0.07)
    for stop in stops:
        end = solve(evaluate_path.endpoint(model, 25, stop), predict, X0)
        np.testing.assert_allclose(end, X1, atol=2e-3)
        way = solve(evaluate_path.until(model, 25, stop), predict, X0)
        np.testing.assert_allclose(way, stop.t * X1 + (1 - stop.t) * eps if stop.k else X0, atol=2e-3)


# ---------------------------------------------------------------- the judge


def named(name, tone="", shade=0):
    full = f"{name} {tone} skin tone" if tone else name
    return Emoji("", full, "people-body", "person-role", tone, "", name), np.full((2, 2, 3), shade, np.uint8)


def test_only_tones_and_identical_images_are_lookalikes():
    people = [
        named("astronaut", shade=1),
        named("man astronaut", shade=1),
        named("astronaut", "dark", 2),
        named("man astronaut", "light", 3),
        named("woman astronaut", shade=4),
        named("cook", "dark", 2),
        named("farmer", shade=5),
    ]
    number = lookalikes(openmoji.Arrays(np.stack([image for _, image in people]), [emoji for emoji, _ in people]))
    assert len({*number[[0, 1, 2, 3, 5]]}) == 1  # the cook has the dark astronaut's image
    assert len({*number[[0, 4, 6]]}) == 3


@pytest.mark.slow
def test_the_judge_finds_real_emoji_and_gives_their_clip_score():
    data, source = make_emoji(), pipeline.locate("openmoji")
    judge, wanted = Judge(source, data), np.arange(len(EMOJI_NAMES))
    scores = judge.scores(judge.real, wanted)
    assert scores["found"] == 1.0
    net, params = CLIPModel.from_pretrained(source, "clip")
    ids = openmoji.caption_ids(Tokenizer.from_pretrained(source), data.emoji)[:, 0]
    want = make_clip_score(net)(params, to_pixels(data.images), ids)
    assert scores["clip_score"] == pytest.approx(float(np.mean(want)), abs=1e-6)
    assert judge.scores(judge.real[::-1], wanted)["found"] == 0.0
    trunk = judge.real_trunk  # the second judge's: the same in any batch, another for each emoji
    assert trunk.shape == (len(EMOJI_NAMES), 96) and len(np.unique(trunk.round(4), axis=0)) == len(EMOJI_NAMES)
    np.testing.assert_allclose(judge.trunk_features(data.images[1:3]), trunk[1:3], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_teachers_guidance_is_that_of_its_pairs(tiny, tmp_path):
    pairs = read_config("generate")
    pairs.update({"model": str(tiny), "count": 4, "shard_size": 4, "batch": 4, "N": 1, "alpha": 3.5, "preview": 1})
    main.run(pairs, str(tmp_path))
    config = shrink_evaluate(read_config("evaluate"), tiny)
    [model] = evaluate_models.load(evaluate.read_entries(config, tmp_path))
    assert model.alpha == 3.5
