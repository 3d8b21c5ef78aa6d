"""Progressive distillation: its target against two DDIM steps of diffusers, its loss, and the stage when killed."""

import functools
import itertools
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import killed_at, load, make_directory, normal, progressive_config, relative

from instaflow_jax import flow, main, pipeline, sampling, solvers, teacher
from instaflow_jax.stages import progressive
from instaflow_jax.train import losses
from instaflow_jax.train.losses import Grid

ALPHA = 3.0  # guidance


# ---------------------------------------------------------------- the target


@pytest.mark.slow
def test_the_target_is_two_guided_ddim_steps_of_diffusers(torch, fast_compilation, tmp_path):
    """Four pairs of steps, from noise to data, of a random network; in fp32, in the flow's variable Z = x / (α + σ)."""
    theirs, steps, first = make_directory(tmp_path / "sd", "flat"), 8, np.arange(0, 8, 2)
    pipe = load(tmp_path / "sd")
    schedule = teacher.read_schedule(pipe.scheduler)
    ddim = solvers.ddim(schedule, steps)
    alpha, sigma = teacher.alpha_sigma(np.append(schedule.abar[ddim.tau], schedule.abar[0]))
    t = alpha / (alpha + sigma)
    np.testing.assert_allclose(teacher.equal_noise(schedule, t[:-1]), ddim.tau, atol=1e-8)

    Z, text, null = normal(0, 4, 8, 8, 4), normal(1, 4, 16, 16), normal(2, 1, 16, 16)

    @jax.jit
    def target(params, Z, text, null):
        bind = progressive.make_bind(schedule, ALPHA)
        velocity_at = bind(functools.partial(pipe.nets["unet"].apply, params), text, null)
        return losses.two_steps(velocity_at, Grid(t, ddim.tau), Z, jnp.asarray(first))

    got = np.asarray(target(pipe.params["unet"], Z, text, null))
    scheduler, landed = diffusers_ddim(pipe.scheduler, steps), []
    for row, i in enumerate(first):
        x = torch.from_numpy(Z[row : row + 1] * np.float32(alpha[i] + sigma[i])).permute(0, 3, 1, 2)
        both = torch.from_numpy(np.concatenate([null, text[row : row + 1]]))
        for tau in scheduler.timesteps[i : i + 2]:
            with torch.no_grad():
                v_null, v_text = theirs.unet(torch.cat([x, x]), tau, both).sample.chunk(2)
            x = scheduler.step(v_null + ALPHA * (v_text - v_null), tau, x).prev_sample
        landed.append(x.permute(0, 2, 3, 1).numpy() / (alpha[i + 2] + sigma[i + 2]))
    length = (t[first + 2] - t[first])[:, None, None, None]
    for row in range(4):
        assert relative(got[row], (np.concatenate(landed) - Z)[row] / length[row]) < 1e-5
        assert relative((Z + length * got)[row], landed[row][0]) < 1e-5


def diffusers_ddim(config, steps):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler.from_config(config | {"set_alpha_to_one": False, "clip_sample": False})
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.slow
@pytest.mark.parametrize("is_flow", [False, True])
def test_a_student_without_error_draws_in_half_the_steps_of_its_teacher(is_flow):
    schedule = teacher.read_schedule({"_class_name": "DDIMScheduler"})
    dynamics = sampling.Flow(1, 1000) if is_flow else schedule
    mix, N, X0 = 0.5 * normal(0, 4, 4), 4, normal(1, 3, 2, 2, 4)

    def network(x, tau, text):
        return jnp.tanh(x @ mix + jnp.cos(tau / 300)[:, None, None, None] + text.mean((1, 2))[:, None, None, None])

    bound = network, normal(2, 3, 5, 6), normal(3, 1, 5, 6)
    grid, velocity_at = progressive.make_grid(dynamics, N), progressive.make_bind(dynamics, ALPHA)(*bound)

    def student(Z, t):
        return losses.two_steps(velocity_at, grid, Z, jnp.full(3, jnp.round(2 * N * t).astype(int)))

    predict = flow.guided(*bound, ALPHA)
    velocity = flow.flow_velocity(*bound, ALPHA) if is_flow else teacher.teacher_velocity(predict, schedule)
    want, got = (
        jax.jit(functools.partial(solvers.integrate, v, solvers.euler(steps)))(X0)
        for v, steps in ((velocity, 2 * N), (student, N))
    )
    assert relative(got, np.asarray(want)) < 1e-5


def test_the_grid_begins_at_noise_with_the_teachers_last_timestep():
    schedule = teacher.read_schedule({"_class_name": "DDIMScheduler"})
    grid = progressive.make_grid(schedule, 2)
    np.testing.assert_array_equal(grid.t, [0, 0.25, 0.5, 0.75, 1])
    assert grid.tau[0] == 999 and np.all(np.diff(grid.tau) < 0)
    np.testing.assert_array_equal(progressive.make_grid(sampling.Flow(1, 1000), 1).tau, [1000, 500])


# ---------------------------------------------------------------- the loss

TEXT = types.SimpleNamespace(apply=lambda params, ids: types.SimpleNamespace(last_hidden_state=params[ids]))
FROZEN = {"text_encoder": normal(9, 16, 3), "null_ids": np.array([[0, 0]])}
BATCH = {"X0": np.full((64, 4, 4, 2), np.nan), "X1": normal(1, 64, 4, 4, 2), "ids": np.arange(128).reshape(64, 2) % 16}


def make_loss(apply, N=4):
    flow_teacher = sampling.Flow(1, 1000)
    grid, bind = progressive.make_grid(flow_teacher, N), progressive.make_bind(flow_teacher, 1.0)
    net = types.SimpleNamespace(apply=apply)
    return losses.make_progressive_loss(net, TEXT, bind, grid, prompt_dropout=0.0, num_timesteps=1000)


def test_the_loss_is_zero_for_the_teachers_velocity_and_weighted_by_the_truncated_snr():
    gradient = jax.jit(jax.value_and_grad(make_loss(lambda params, Z, tau, text: params + 0 * Z), has_aux=True))
    frozen, key = FROZEN | {"teacher": jnp.float32(2.0)}, jax.random.key(0)
    assert gradient(jnp.float32(2.0), frozen, BATCH, key)[0][0] == 0
    (value, metrics), slope = gradient(jnp.float32(2.5), frozen, BATCH, key)
    assert 0.25 * 0.5**2 < value < 0.25 and metrics["error_t1"] == pytest.approx(0.25) and slope > 0


def test_the_student_is_trained_at_its_own_times_on_paths_from_fresh_noise_to_the_data():
    seen = []

    def record(params, Z, tau, text):
        seen.append((Z, tau))
        return Z

    loss = make_loss(record)
    for key in (0, 1):
        loss(0.0, FROZEN | {"teacher": 0.0}, BATCH, jax.random.key(key))
    points, timesteps = zip(*seen, strict=True)  # student, teacher, teacher, twice
    assert set(np.unique(timesteps[0])) == {1000.0, 750.0, 500.0, 250.0}
    np.testing.assert_array_equal(timesteps[1], timesteps[0])
    np.testing.assert_array_equal(points[1], points[0])
    np.testing.assert_allclose(timesteps[2], timesteps[0] - 125)
    t = (1 - np.asarray(timesteps[0]) / 1000)[:, None, None, None]
    noise = (points[0] - t * BATCH["X1"]) / (1 - t)
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.05
    assert not np.allclose(points[0], points[3])


# ---------------------------------------------------------------- the stage


@pytest.fixture(scope="module")
def run(only_training, teacher, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    main.run(progressive_config(teacher), str(workdir))
    return workdir


def flow_of(workdir, N):
    return pipeline.load(str(workdir / f"progressive_{N}" / "export"), variant=None, attention="xla")


@pytest.mark.slow
def test_a_run_killed_between_and_within_rounds_ends_the_same(run, teacher, tmp_path):
    config, before, moved = progressive_config(teacher), tmp_path / "before", tmp_path / "moved"
    shutil.copytree(run, before)
    shutil.rmtree(before / "progressive_1")  # what a kill between the rounds leaves
    with killed_at(3):  # after the checkpoint of step 2
        main.run(config, str(before))
    assert (before / "progressive_1/checkpoints/2").is_dir() and not (before / "progressive_1/export").exists()
    before.rename(moved)
    main.run(config, str(moved))
    for N in (2, 1):
        once, twice = (flow_of(workdir, N).params["unet"] for workdir in (run, moved))
        assert all(np.array_equal(p, twice[name]) for name, p in once.items())
    assert (run / "progressive_1/metrics.jsonl").read_text() == (moved / "progressive_1/metrics.jsonl").read_text()


@pytest.mark.slow
def test_every_round_makes_a_flow_that_draws_in_one_step(run, teacher):
    pipes = [load(teacher), flow_of(run, 2), flow_of(run, 1)]
    weights = [pipe.params["unet"] for pipe in pipes]
    assert all(any(np.any(a[name] != b[name]) for name in a) for a, b in itertools.pairwise(weights))
    dynamics = sampling.read_dynamics(pipes[1].scheduler, pipes[1].index, "auto")
    assert dynamics == sampling.Flow(1, 1000)
    solve = sampling.make_solve(pipes[1].nets["unet"].apply, dynamics, "auto", 1, 1.0)
    draw = jax.jit(sampling.make_generate(pipes[1].nets, solve))
    ids, null = pipes[1].tokenizer(["house"]), pipes[1].tokenizer([""])
    images = [np.asarray(draw(pipe.params, ids, null, normal(0, 1, 4, 4, 4))[0]) for pipe in pipes[1:]]
    assert images[0].std() > 0 and np.any(images[0] != images[1])


@pytest.mark.slow
def test_finished_rounds_are_not_run_again(run, teacher, capsys):
    main.run(progressive_config(teacher), str(run))
    printed = capsys.readouterr().out
    assert "progressive_1: a flow of N=1 steps" in printed and "a flow of N=2 steps" not in printed


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"rounds.N": (4, 1)}, r"config.rounds.N=(4, 1): each number of steps must be half the one before it"),
        (
            {"rounds.steps": (4,)},
            "config.rounds.steps=(4,) must hold a number of training steps for each of the N=(2, 1)",
        ),
        ({"rounds.steps": (4, 1)}, "warmup_steps=1 must be below total_steps=1"),
        ({"rounds.N": (1, 0)}, "config.rounds.N=(1, 0) must be at least 1"),
        ({"pairs.solver": "euler"}, "solver='euler' does not fit a teacher"),
    ],
)
def test_what_can_be_refused_is_refused_before_pairs_are_made(fields, words, teacher, tmp_path):
    config = progressive_config(teacher)
    config.update_from_flattened_dict(fields)
    with pytest.raises(ValueError) as refused:
        main.run(config, str(tmp_path))
    assert words in str(refused.value) and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_run_is_not_continued_with_other_rounds(run, teacher):
    config = progressive_config(teacher)
    config.rounds.N = (4, 2)
    with pytest.raises(ValueError, match=r"progressive_2 holds a run with other settings"):
        main.run(config, str(run))
