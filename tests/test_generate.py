"""The stage `generate`: the same pairs on any devices and after any kill, exact pairs, errors that name the damage."""

import os
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_training

from instaflow_jax import main, pipeline, sampling
from instaflow_jax.data.noise import noise
from instaflow_jax.data.pairs import manifest as pairs_manifest
from instaflow_jax.data.pairs import store as pairs_store
from instaflow_jax.data.pairs.reader import Pairs
from instaflow_jax.infra import files
from instaflow_jax.models.clip import CLIPTextModel
from instaflow_jax.models.unet import UNet2DConditionModel
from instaflow_jax.models.vae import AutoencoderKL
from instaflow_jax.stages.generate import job as generate_job
from instaflow_jax.stages.generate import stage as generate
from instaflow_jax.stages.pretrain.diffusion import INDEX
from instaflow_jax.weights.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("fast_compilation")

ROOT = Path(__file__).parent.parent
PROMPTS = ["red apple", "house", "cat face", "a face", "woman astronaut", "rocket", "octopus"]
COUNT, SHARD = 40, 8
SMALL = {"block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 4}
UNET = SMALL | {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
UNET |= {"cross_attention_dim": 8, "attention_head_dim": 1}
VAE = SMALL | {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
VAE |= {"scaling_factor": 0.5}
TEXT = {"vocab_size": 2048, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
TEXT |= {"num_attention_heads": 1, "max_position_embeddings": 16, "eos_token_id": 2047}
SCHEDULER = {"_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULER |= {"steps_offset": 1, "set_alpha_to_one": False, "skip_prk_steps": True}


def write_teacher(directory):
    """Writes a complete pipeline of random weights, with one level, because these tests mostly wait for compilation."""
    nets = {
        "unet": UNet2DConditionModel.from_config(UNET),
        "vae": AutoencoderKL.from_config(VAE),
        "text_encoder": CLIPTextModel.from_config(TEXT),
    }
    params = {name: jax.device_get(net.init(jax.random.key(0))) for name, net in nets.items()}
    tokenizer = Tokenizer.from_pretrained(pipeline.locate("openmoji"))
    pipeline.save(pipeline.Pipeline(nets, params, tokenizer, SCHEDULER, INDEX), directory)
    return directory


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    directory = tmp_path_factory.mktemp("compiled")
    with toy_training.compile_once(directory):
        yield directory


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return write_teacher(folder)


def fields(teacher, **changed):
    return {
        "model": str(teacher),
        "prompts.source": str(teacher / "prompts.txt"),
        "N": 3,
        "count": COUNT,
        "shard_size": SHARD,
        "batch": 4,
        "preview": 2,
    } | changed


def configured(teacher, **changed):
    config = runpy.run_path(str(ROOT / "configs" / "generate.py"))["get_config"]()
    config.update_from_flattened_dict(fields(teacher, **changed))
    return config


@pytest.fixture(scope="module")
def made(teacher, tmp_path_factory):
    """The reference pairs: one process, one device, no interruption."""
    workdir = tmp_path_factory.mktemp("made")
    main.run(configured(teacher), str(workdir))
    return workdir / "pairs"


@pytest.fixture
def copy(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "pairs"))


def start(teacher, workdir, cache, *, devices=1, **changed):
    """Runs the command line in another process, with simulated devices."""
    flags = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [f"--config.{name}={value}" for name, value in fields(teacher, **changed).items()]
    return subprocess.Popen(
        [sys.executable, "-m", "instaflow_jax.main", "--config=configs/generate.py", f"--workdir={workdir}", *command],
        cwd=ROOT,
        env=os.environ | flags,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def data(directory):
    """Every byte that readers see, by file name; without the preview and the manifest's information on the machine."""
    manifest = pairs_manifest.read(directory)
    files = {path.name: path.read_bytes() for path in directory.iterdir() if path.suffix != ".png"}
    return files | {"manifest.json": {name: manifest[name] for name in ("recipe", "shards")}}


# ---------------------------------------------------------------- content


def test_pairs_have_the_prompts_and_noise_of_their_numbers(made, teacher):
    pairs, tokenizer = Pairs(made), Tokenizer.from_pretrained(teacher)
    assert len(pairs) == COUNT and len(pairs.manifest["shards"]) == 5
    for number in (0, 6, 7, 8, 39):
        pair, prompt = pairs[number], PROMPTS[number % len(PROMPTS)]
        assert pair["prompt"] == prompt
        np.testing.assert_array_equal(pair["ids"], tokenizer([prompt])[0])
        np.testing.assert_array_equal(pair["X0"], noise(0, number, (4, 4, 4)))
    assert np.std([pairs[number]["X1"].astype(float) for number in range(COUNT)]) > 0.1
    assert (made / "preview.png").is_file() and (made / "dataset_info.json").is_file()


@pytest.mark.slow
def test_integrating_again_by_the_recipe_gives_the_same_pair(made, teacher):
    pairs = Pairs(made)
    recipe, pipe = pairs.manifest["recipe"], pipeline.load(str(teacher), variant=None, attention="xla")
    schedule = sampling.read_dynamics(recipe["dynamics"], pipe.index, recipe["kind"])
    solve = sampling.make_solve(pipe.nets["unet"].apply, schedule, recipe["solver"], recipe["N"], recipe["alpha"])
    batch = pairs.batch(range(5, 10))

    def encode(ids):
        return pipe.nets["text_encoder"].apply(pipe.params["text_encoder"], ids).last_hidden_state

    again = jax.jit(solve)(
        pipe.params["unet"],
        batch["X0"].astype(np.float32),
        encode(batch["ids"]),
        encode(pipe.tokenizer([recipe["negative"]])),
    )
    # float16's rounding, and float32's of latents up to 33
    np.testing.assert_allclose(batch["X1"], np.asarray(again), rtol=2**-11, atol=33 * 1e-6)


def test_the_recipe_holds_weights_prompts_and_solver(made, teacher):
    recipe, pipe = pairs_manifest.read(made)["recipe"], pipeline.load(str(teacher), variant=None, attention="xla")
    for name, params in pipe.params.items():
        assert recipe["teacher"][name] == files.sha256_of_params(params)
    assert (recipe["solver"], recipe["N"], recipe["alpha"], recipe["negative"]) == ("dpm_solver", 3, 2.0, "")
    assert (recipe["scaling_factor"], recipe["latent_shape"], recipe["dynamics"]["beta_end"]) == (0.5, [4, 4, 4], 0.012)


# ---------------------------------------------------------------- reproducibility


@pytest.mark.slow
def test_eight_devices_and_two_processes_make_the_same_bytes(made, teacher, tmp_path, cache):
    """Process 0 with eight devices and process 1 with two, at the same time, in one directory."""
    runs = [
        start(teacher, tmp_path, cache, devices=devices, processes=2, process=process)
        for process, devices in enumerate((8, 2))
    ]
    logged = [run.communicate(timeout=240)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], logged
    assert "3 of 3" not in logged[0] and "0 of 3 shards are finished" in logged[0] and "on 8 devices" in logged[0]
    assert "0 of 2 shards are finished" in logged[1] and "on 2 devices" in logged[1]
    assert data(tmp_path / "pairs") == data(made)


@pytest.mark.slow
def test_a_run_killed_repeatedly_ends_with_the_same_bytes(teacher, tmp_path, cache):
    """Killed while the first shard is written, then after some shards; the last run makes the rest."""
    directory = tmp_path / "pairs"
    for finished in (0, 2):
        run = start(teacher, tmp_path, cache, batch=1)
        kill_when(run, directory, finished)
    metadata = {path: path.stat().st_mtime_ns for path in directory.glob("*.json") if "train" in path.name}
    assert len(metadata) < 5
    for workdir in (tmp_path, tmp_path / "unbroken"):
        main.run(configured(teacher, batch=1), str(workdir))
    assert data(directory) == data(tmp_path / "unbroken" / "pairs")
    assert {path: path.stat().st_mtime_ns for path in metadata} == metadata
    assert not list(directory.glob(".*"))


def kill_when(run, directory, finished):
    """Sends SIGKILL as soon as this many shards are finished and one more is being written."""
    end = time.monotonic() + 120
    while time.monotonic() < end and run.poll() is None:
        names = [path.name for path in directory.glob("*pairs-*")] + [path.name for path in directory.glob(".pairs-*")]
        if sum(name.endswith(".json") for name in names) >= finished and any(name.startswith(".") for name in names):
            break
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL, run.stdout.read()


@pytest.mark.slow
@pytest.mark.parametrize("batch", [3, 16])
def test_another_batch_size_gives_the_same_pairs(made, teacher, tmp_path, batch):
    main.run(configured(teacher, batch=batch, count=11), str(tmp_path))
    pairs, expected = Pairs(tmp_path / "pairs").batch(range(11)), Pairs(made).batch(range(11))
    np.testing.assert_array_equal(pairs["X0"], expected["X0"])
    np.testing.assert_allclose(pairs["X1"], expected["X1"], rtol=2**-10, atol=1e-6)


@pytest.mark.slow
def test_stored_seeds_give_the_same_pairs_as_stored_noise(made, teacher, tmp_path):
    main.run(configured(teacher, store_noise=False), str(tmp_path))
    seeds = tmp_path / "pairs"
    for name, rows in Pairs(made).batch(range(COUNT)).items():
        np.testing.assert_array_equal(Pairs(seeds).batch(range(COUNT))[name], rows)


# ---------------------------------------------------------------- damage and refusals


def test_a_finished_directory_is_not_changed_and_damage_is_repaired(made, teacher, copy, capsys):
    before = data(copy)
    main.run(configured(teacher), str(copy.parent))
    assert "5 of 5 shards are finished" in capsys.readouterr().out and data(copy) == before
    damaged, missing = (pairs_store.shard_path(copy, pairs_manifest.read(copy)["recipe"], shard) for shard in (1, 3))
    damaged.write_bytes(damaged.read_bytes()[:5000] + b"?" + damaged.read_bytes()[5001:])
    missing.unlink()
    with pytest.raises(
        ValueError, match=f"2 of 5 shards must be made again: .*{damaged.name} is damaged.*{missing.name} is mis"
    ):
        main.run(configured(teacher, inspect=True), str(copy.parent))
    damaged.unlink()
    main.run(configured(teacher), str(copy.parent))
    assert "3 of 5 shards are finished" in capsys.readouterr().out and data(copy) == before


def test_inspect_prints_the_manifest_and_draws_a_preview(copy, teacher, capsys):
    (copy / "preview.png").unlink()
    main.run(configured(teacher, inspect=True), str(copy.parent))
    logged = capsys.readouterr().out
    assert '"solver": "dpm_solver"' in logged and "40 pairs in 5 shards" in logged and "all checksums match" in logged
    assert (copy / "preview.png").is_file()


@pytest.mark.slow
def test_a_full_disk_names_the_shard_and_keeps_the_finished_ones(made, teacher, copy):
    missing = pairs_store.shard_path(copy, pairs_manifest.read(copy)["recipe"], 4)
    missing.unlink()
    before = data(copy)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
    try:
        with pytest.raises(OSError, match=f"{missing.name}.*File too large.*make room and start again"):
            main.run(configured(teacher), str(copy.parent))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert data(copy) == before
    main.run(configured(teacher), str(copy.parent))
    assert data(copy) == data(made)


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"alpha": 3.0}, "alpha is 2.0, not 3.0"),
        ({"seed": 1}, "seed is 0, not 1"),
        ({"N": 4}, "N is 3, not 4"),
        ({"prompts.cleaning.min_chars": 6}, "prompts_sha256 is"),
    ],
)
def test_another_recipe_is_refused(copy, teacher, changed, words):
    with pytest.raises(ValueError, match=f"manifest.json belongs to other pairs: .*{words}.* Use another directory"):
        main.run(configured(teacher, **changed), str(copy.parent))


def test_another_teacher_is_refused(copy, teacher, tmp_path):
    """The same networks with other weights."""
    other = pipeline.load(str(teacher), variant=None, attention="xla")
    other.params["unet"]["conv_out.bias"] = other.params["unet"]["conv_out.bias"] + 1
    pipeline.save(other, tmp_path / "other")
    with pytest.raises(ValueError, match=r"manifest.json belongs to other pairs: teacher is .* Use another directory"):
        main.run(configured(teacher, model=str(tmp_path / "other")), str(copy.parent))


def test_a_pair_that_is_not_finite_is_refused(teacher):
    job = generate.read_job(configured(teacher))
    X1 = jnp.zeros((4, 4, 4, 4)).at[2].set(jnp.inf)
    with pytest.raises(ValueError, match=r"pair 9 \('cat face'\) is not finite"):
        generate_job.fetch(job, range(7, 10), None, None, X1)


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"batch": 0}, r"config.batch=0 must be at least 1"),
        ({"dtype": "int8"}, r"config.dtype='int8'"),
        ({"processes": 2, "process": 2}, r"config.process=2 must be one of 0 to 1"),
        ({"alpha": 1.0, "negative": "a face"}, "guidance needs alpha > 1"),
        ({"solver": "euler"}, "does not fit a teacher"),
        ({"count": -1}, r"config.count=-1"),
        ({"seed": -1}, r"config.seed=-1"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(teacher, tmp_path, changed, words):
    with pytest.raises(ValueError, match=words):
        main.run(configured(teacher, **changed), str(tmp_path))
    assert not list(tmp_path.iterdir())
