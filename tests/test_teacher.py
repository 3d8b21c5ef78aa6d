"""The teacher's solvers against diffusers' schedulers and against Gaussians with known answers."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import references, unchecked

from instaflow_jax import flow, solvers, teacher

torch = references()  # before diffusers, which imports torchvision
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, PNDMScheduler, StableDiffusionPipeline

B, H, W, C, L, D = 2, 4, 4, 4, 3, 6
ALPHA = 5.0  # guidance
random = np.random.default_rng(0)
MIX, TIME, TEXT = (0.3 * random.standard_normal(s) for s in ((C, C), (8, C), (D, C)))

SD15 = {  # as the checkpoint's scheduler_config.json has it
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
SD21 = SD15 | {"_class_name": "DDIMScheduler", "_diffusers_version": "0.8.0", "prediction_type": "v_prediction"}
CONFIGS = {"sd15": SD15, "sd21": SD21}
THEIRS = {"ddim": DDIMScheduler, "dpm_solver": DPMSolverMultistepScheduler}


def normal(*shape, seed=1):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


XT, TEXT_EMBEDS, NULL_EMBEDS = normal(B, H, W, C), normal(B, L, D, seed=2), normal(B, L, D, seed=3)


def twin(xp, as_array):
    """One small nonlinear network of latents, tau and text, in jax.numpy or in torch."""
    mix, time, words, frequency = (as_array(w.astype(np.float32)) for w in (MIX, TIME, TEXT, 0.03 ** np.arange(8)))

    def network(x, tau, context):
        temporal = xp.cos(tau[:, None] * frequency) @ time
        return 0.5 * x + xp.tanh(x @ mix + (temporal + context.mean(1) @ words)[:, None, None])

    return network


jax_network, torch_network = twin(jnp, jnp.asarray), twin(torch, torch.from_numpy)


@jax.jit
def run(rows):
    return solvers.integrate(flow.guided(jax_network, TEXT_EMBEDS, NULL_EMBEDS, ALPHA), rows, XT)


def ours(solver, config, N):
    return np.asarray(run(solvers.TEACHER_SOLVERS[solver](teacher.read_schedule(config), N)))


def theirs(scheduler, N):
    x, context = torch.from_numpy(XT), torch.from_numpy(np.concatenate([NULL_EMBEDS, TEXT_EMBEDS]))
    scheduler.set_timesteps(N)
    for tau in scheduler.timesteps:
        null, text = torch_network(torch.cat([x, x]), tau.repeat(2 * B).float(), context).chunk(2)
        x = scheduler.step(null + ALPHA * (text - null), tau, x).prev_sample
    return x.numpy()


def relative(got, want):
    return np.linalg.norm(np.asarray(got) - want) / np.linalg.norm(want)


def assert_follows_diffusers(solver, config, N):
    assert_follows(THEIRS[solver].from_config(config), solver, config, N)


def assert_follows(scheduler, solver, config, N):
    want = theirs(scheduler, N)
    assert np.all(np.isfinite(want))
    rows = solvers.TEACHER_SOLVERS[solver](teacher.read_schedule(config), N)
    np.testing.assert_array_equal(rows.tau, scheduler.timesteps)
    assert relative(run(rows), want) < 1e-4


def vp_grid(N, low=-4.0, high=4.0):
    """N + 1 variance-preserving noise levels, from noise to data, log-SNR lambda rising smoothly and unevenly."""
    u = np.linspace(0, 1, N + 1)
    rate = np.exp(low + (high - low) * (0.6 * u + 0.4 * u**2))
    return rate / np.sqrt(1 + rate**2), 1 / np.sqrt(1 + rate**2)


MEAN, STD = 0.7, 1.5  # the Gaussian whose answers are known


def gaussian_data(x, alpha, sigma):
    """E[X1 | x] for X1 ~ N(MEAN, STD^2) per dimension: the perfect data prediction."""
    return MEAN + alpha * STD**2 / ((alpha * STD) ** 2 + sigma**2) * (x - alpha * MEAN)


def gaussian_network(schedule):
    """The perfect network of that Gaussian at real-valued tau, its log-SNR linear between the integers."""
    abar = np.maximum(schedule.abar, 2.0**-24)
    log_snr = np.log(abar / (1 - abar))

    def predict(x, tau):
        level = jnp.interp(tau, jnp.arange(len(abar)), log_snr)
        alpha, sigma = jnp.sqrt(jax.nn.sigmoid(level)), jnp.sqrt(jax.nn.sigmoid(-level))
        data = gaussian_data(x, alpha, sigma)
        eps = (x - alpha * data) / sigma
        return {"epsilon": eps, "v_prediction": alpha * eps - sigma * data, "sample": data}[schedule.prediction_type]

    return predict


# --- diffusers' schedulers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", [None, "leading", "trailing", "linspace"])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("solver", THEIRS)
def test_25_guided_steps_follow_diffusers(solver, config, spacing, prediction_type):
    chosen = {} if spacing is None else {"timestep_spacing": spacing}
    assert_follows_diffusers(solver, CONFIGS[config] | chosen | {"prediction_type": prediction_type}, 25)


@pytest.mark.parametrize("N", [1, 2, 4, 8, 10, 50])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("solver", THEIRS)
def test_other_numbers_of_steps_follow_diffusers(solver, spacing, N):
    assert_follows_diffusers(solver, SD21 | {"timestep_spacing": spacing}, N)


@pytest.mark.parametrize(
    "change",
    [
        {"prediction_type": "sample"},
        {"set_alpha_to_one": True},
        {"final_sigmas_type": "sigma_min"},
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
        {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
        {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
        {"trained_betas": list(np.geomspace(1e-4, 0.03, 500)), "num_train_timesteps": 500},
    ],
    ids=lambda change: "-".join(map(str, change)),
)
@pytest.mark.parametrize("N", [14, 15])  # 15 is where DPM-Solver's last step may be of second order
@pytest.mark.parametrize("solver", THEIRS)
def test_every_field_of_the_schedule_means_what_it_means_to_diffusers(solver, N, change):
    assert_follows_diffusers(solver, SD15 | change, N)


@pytest.mark.parametrize("solver", THEIRS)
@pytest.mark.parametrize("wrote", sorted(teacher.SUPPORTED["_class_name"]))
def test_a_file_written_by_any_supported_class_reads_as_diffusers_reads_it(solver, wrote):
    import diffusers

    written = dict(getattr(diffusers, wrote).from_config(SD15 | {"_class_name": wrote}).config)
    unset = written.pop("_use_default_values")
    written.pop("_ignore_files", None)
    if "clip_sample" in written:
        written["clip_sample"] = False  # DDPM's constructor turns it on where a file is unset
    for config in (written, written | {"_use_default_values": unset}):
        scheduler = THEIRS[solver].from_config(config)
        schedule = teacher.read_schedule(config)
        rows = solvers.TEACHER_SOLVERS[solver](schedule, 10)
        scheduler.set_timesteps(10)
        np.testing.assert_array_equal(rows.tau, scheduler.timesteps)
        np.testing.assert_allclose(schedule.abar, scheduler.alphas_cumprod, rtol=1e-5)


def test_a_unset_file_leaves_the_spacing_to_the_solver_even_when_read_through_its_own_class():
    schedule, through = teacher.read_schedule(SD15), PNDMScheduler.from_config(SD15).config
    for solver, first in (("ddim", 961), ("dpm_solver", 999)):  # leading, linspace
        scheduler = THEIRS[solver].from_config(through)
        scheduler.set_timesteps(25)
        assert solvers.TEACHER_SOLVERS[solver](schedule, 25).tau[0] == scheduler.timesteps[0] == first


BEFORE_OFFSETS = {k: v for k, v in SD15.items() if k != "steps_offset"}


@pytest.mark.parametrize(
    ("config", "overruled"),
    [
        (BEFORE_OFFSETS, []),
        (SD15 | {"steps_offset": 0}, ["steps_offset=0 is read as 1"]),
        (SD15 | {"steps_offset": 3}, ["steps_offset=3 is read as 1"]),
        (SD15 | {"clip_sample": True}, ["clip_sample=True is read as False"]),
        (BEFORE_OFFSETS | {"tensor_format": "pt", "timestep_values": None, "predict_epsilon": True}, []),
        (BEFORE_OFFSETS | {"steps_offset": 0, "clip_sample": True}, ["steps_offset=0", "clip_sample=True"]),
    ],
    ids=["absent", "0", "3", "clip", "2022", "both"],
)
@pytest.mark.parametrize("solver", THEIRS)
@pytest.mark.filterwarnings("ignore::FutureWarning")  # diffusers' own notes about these files
def test_old_scheduler_files_are_read_as_the_reference_pipeline_reads_them(solver, config, overruled):
    config = config | {"timestep_spacing": "leading"}
    parts = dict.fromkeys(["vae", "text_encoder", "tokenizer", "unet", "safety_checker", "feature_extractor"])
    scheduler = THEIRS[solver].from_config(config)
    pipe = StableDiffusionPipeline(**parts, scheduler=scheduler, requires_safety_checker=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        teacher.read_schedule(config)
    assert len(caught) == len(overruled)
    assert all(words in str(w.message) for words, w in zip(overruled, caught, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_follows(pipe.scheduler, solver, config, 25)
        assert solvers.ddim(teacher.read_schedule(config), 25).tau[0] == 961


def test_predict_epsilon_is_the_old_name_of_the_prediction_type():
    for old, new, want in (
        (True, None, "epsilon"),
        (False, None, "sample"),
        (False, "v_prediction", "v_prediction"),
        (True, "sample", "sample"),
    ):
        config = SD15 | {"predict_epsilon": old} | ({"prediction_type": new} if new else {})
        assert teacher.read_schedule(config).prediction_type == want


def test_trailing_gives_the_steps_asked_for_where_diffusers_rounding_adds_one():
    scheduler = DDIMScheduler.from_config(SD15 | {"timestep_spacing": "trailing"})
    scheduler.set_timesteps(61)
    tau = solvers.ddim(teacher.read_schedule(SD15 | {"timestep_spacing": "trailing"}), 61).tau
    assert len(scheduler.timesteps) == 62
    assert scheduler.timesteps[-1] == -1
    np.testing.assert_array_equal(tau, scheduler.timesteps[:61])


# --- order of convergence and known answers ----------------------------------------------------------------------


@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("dpm", 2)])
def test_solver_orders_on_a_gaussian(solver, order):
    def error(N):
        alpha, sigma = vp_grid(N)
        levels = (alpha[:-1], sigma[:-1], alpha[1:], sigma[1:])
        coefficients = (
            solvers.ddim_coefficients(*levels)
            if solver == "ddim"
            else solvers.dpm_coefficients(*levels, first_order_last=False)
        )
        data = solvers.data_coefficients("sample", *levels[:2])
        a, s = jnp.asarray(alpha), jnp.asarray(sigma)
        X = solvers.integrate(
            lambda x, i: gaussian_data(x, a[i], s[i]), solvers.Multistep(np.arange(N), *data, *coefficients), XT
        )
        spread = np.hypot(alpha * STD, sigma)  # (x - alpha MEAN) / spread is constant along the ODE
        want = alpha[-1] * MEAN + spread[-1] / spread[0] * (XT - alpha[0] * MEAN)
        return np.abs(np.asarray(X) - want).max()

    errors = [error(N) for N in (20, 40, 80)]
    np.testing.assert_allclose(np.divide(errors[:-1], errors[1:]), 2.0**order, rtol=0.15)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_solvers_land_on_the_gaussian_whatever_the_network_predicts(prediction_type):
    config = SD15 | {"prediction_type": prediction_type, "timestep_spacing": "trailing", "set_alpha_to_one": True}
    schedule = teacher.read_schedule(config)
    last = schedule.abar[-1]
    want = MEAN + STD / np.sqrt(last * STD**2 + 1 - last) * (XT - np.sqrt(last) * MEAN)
    for solver, N in ((solvers.ddim, 500), (solvers.dpm_solver, 50)):
        assert relative(solvers.integrate(gaussian_network(schedule), solver(schedule, N), XT), want) < 5e-3


ZERO_SNR = SD21 | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "set_alpha_to_one": True}


def test_the_teacher_as_a_flow_reaches_the_same_images_as_its_solver():
    schedule = teacher.read_schedule(ZERO_SNR)  # begins at noise itself, so that both have the same start
    predict = gaussian_network(schedule)
    by_solver = solvers.integrate(predict, solvers.dpm_solver(schedule, 200), XT)
    by_flow = solvers.integrate(teacher.teacher_velocity(predict, schedule), solvers.euler(1000), XT)
    assert relative(by_flow, np.asarray(by_solver)) < 2e-3
    assert relative(by_flow, MEAN + STD * XT) < 2e-3


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_teachers_velocity_is_the_rectified_flow_of_the_same_gaussian(prediction_type):
    schedule = teacher.read_schedule(SD15 | {"prediction_type": prediction_type})
    velocity = teacher.teacher_velocity(gaussian_network(schedule), schedule)
    for t in (0.07, 0.3, 0.5, 0.9, 0.97):  # inside the schedule's ends, 0.064 and 0.972
        spread = (t * STD) ** 2 + (1 - t) ** 2
        exact = MEAN + (t * STD**2 - (1 - t)) / spread * (XT - t * MEAN)
        assert relative(velocity(XT, jnp.float32(t)), exact) < 1e-4


def test_an_ordinary_teacher_seen_as_a_flow_lands_near_its_data_from_pure_noise():
    schedule = teacher.read_schedule(SD15)
    got = solvers.integrate(teacher.teacher_velocity(gaussian_network(schedule), schedule), solvers.euler(500), XT)
    assert relative(got, MEAN + STD * XT) < 0.01  # the schedule never saw t < 0.064


def test_the_velocity_asks_the_network_for_the_time_of_its_noise_level():
    schedule = teacher.read_schedule(SD15)
    asked = []

    def predict(x, tau):
        asked.append(float(tau))
        return x

    velocity = teacher.teacher_velocity(predict, schedule)
    for tau in (999, 500, 0):
        alpha, sigma = np.sqrt(schedule.abar[tau]), np.sqrt(1 - schedule.abar[tau])
        velocity(XT, jnp.float32(alpha / (alpha + sigma)))
    velocity(XT, 0.0)
    velocity(XT, 1.0)
    np.testing.assert_allclose(asked, [999, 500, 0, 999, 0], atol=2e-3)


def test_noise_and_targets_are_diffusers_own():
    X1, eps, tau = normal(3, H, W, C), normal(3, H, W, C, seed=2), np.array([0, 500, 999])
    torch_args = (torch.from_numpy(X1), torch.from_numpy(eps), torch.from_numpy(tau))
    scheduler = DDIMScheduler.from_config(SD21)
    targets = {"epsilon": eps, "v_prediction": scheduler.get_velocity(*torch_args).numpy(), "sample": X1}
    for prediction_type, want in targets.items():
        schedule = teacher.read_schedule(SD21 | {"prediction_type": prediction_type})
        noisy = teacher.add_noise(schedule, X1, eps, tau)
        np.testing.assert_allclose(noisy, scheduler.add_noise(*torch_args), rtol=1e-4, atol=1e-5)
        target = teacher.training_target(schedule, X1, eps, tau)
        np.testing.assert_allclose(target, want, rtol=1e-4, atol=1e-5)
        alpha, sigma = np.sqrt(schedule.abar[tau]), np.sqrt(1 - schedule.abar[tau])
        p, q = (w[:, None, None, None] for w in solvers.data_coefficients(prediction_type, alpha, sigma))
        np.testing.assert_allclose(p * noisy + q * target, X1, atol=1e-4)  # the right answer names the data


def test_a_schedule_can_be_neither_changed_nor_confused():
    schedule = teacher.read_schedule(SD15)
    with pytest.raises(ValueError, match="read-only"):
        schedule.abar[0] = 1
    with pytest.raises(AttributeError):
        schedule.timestep_spacing = None
    assert hash(schedule) is not None  # static under jit


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"_class_name": "UniPCMultistepScheduler"},
            r"_class_name='UniPC.*' is not supported; supported: DDIMSched.*PNDM",
        ),
        ({"prediction_type": "flow_prediction"}, "prediction_type='flow_prediction' .* epsilon, v_prediction, sample"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule='sigmoid' .* linear, scaled_linear, squaredcos_cap_v2"),
        ({"timestep_spacing": "even"}, "timestep_spacing='even' .* leading, trailing, linspace"),
        ({"final_sigmas_type": "one"}, "final_sigmas_type='one' .* zero, sigma_min"),
        ({"timestep_values": [1]}, r"timestep_values=\[1\] is not supported; supported: None"),
        ({"thresholding": True}, "thresholding=True is not supported; supported: False"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas=True is not supported; supported: False"),
        ({"algorithm_type": "sde-dpmsolver++"}, r"algorithm_type='sde-dpmsolver\+\+' .* supported: dpmsolver\+\+"),
        ({"solver_order": 3}, "solver_order=3 is not supported; supported: 2"),
        ({"variance_type": "learned_range"}, "variance_type='learned_range' is not supported"),
        ({"bete_start": 0.1}, "unknown field bete_start=0.1; known: num_train_timesteps, beta_start"),
        ({"trained_betas": [0.1, 0.2]}, r"trained_betas has shape \(2,\), but num_train_timesteps=1000"),
        ({"beta_end": 1.5}, r"betas run from 0.00085 to 1.5, but must lie in \(0, 1\)"),
    ],
)
def test_what_a_scheduler_file_may_not_say(change, message):
    with pytest.raises(ValueError, match=message):
        teacher.read_schedule(SD15 | change)


def test_a_scheduler_file_must_name_its_class():
    with pytest.raises(ValueError, match="no _class_name; supported: DDIMScheduler"):
        teacher.read_schedule({"beta_schedule": "linear"})


@pytest.mark.parametrize("N", [0, -3, 1001, 2.5, True])
@pytest.mark.parametrize("solver", solvers.TEACHER_SOLVERS.values())
def test_a_wrong_number_of_steps_is_refused(solver, N):
    with pytest.raises(
        ValueError, match=f"N={N!r} is not a valid number of solver steps; use an integer from 1 to 1000"
    ):
        unchecked(solver)(teacher.read_schedule(SD15), N)


@pytest.mark.parametrize(
    ("solver", "spacing", "N"),
    [
        (solvers.ddim, "leading", 1000),  # the offset pushes the first step to 1000
        (solvers.dpm_solver, "leading", 1000),  # 1001 points over 1000 times: all of them 0
        (solvers.dpm_solver, "linspace", 1000),
    ],
)
def test_a_grid_that_leaves_the_schedule_is_refused(solver, spacing, N):
    schedule = teacher.read_schedule(SD15 | {"timestep_spacing": spacing})
    with pytest.raises(ValueError, match=f"N=1000 steps with timestep_spacing='{spacing}' and steps_offset=1 do not"):
        solver(schedule, N)


def test_ddim_refuses_an_epsilon_network_where_there_is_only_noise():
    schedule = teacher.read_schedule(ZERO_SNR | {"prediction_type": "epsilon"})
    with pytest.raises(ValueError, match="prediction_type='epsilon' cannot start at abar = 0"):
        solvers.ddim(schedule, 10)
