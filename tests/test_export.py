"""Stage `export`: each format read by the program it is for, with the differences printed; errors, cards, kills."""

import dataclasses
import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import flip, normal, read_config, relative, with_flax_classes
from jax import export as jax_export
from PIL import Image

from instaflow_jax import main, pipeline, sampling
from instaflow_jax.infra import checkpoint, files, images
from instaflow_jax.infra.checkpoint import Checkpoints
from instaflow_jax.models.clip import CLIPTextModel
from instaflow_jax.models.unet import UNet2DConditionModel
from instaflow_jax.models.vae import AutoencoderKL
from instaflow_jax.stages import distill
from instaflow_jax.stages.common import loading
from instaflow_jax.stages.export import card as export_card
from instaflow_jax.stages.export import formats as export_formats
from instaflow_jax.stages.export import licence as export_licence
from instaflow_jax.stages.export import source as export_source
from instaflow_jax.stages.pretrain import diffusion as pretrain_diffusion
from instaflow_jax.train import optim, state
from instaflow_jax.weights.tokenizer import Tokenizer

UNET = {"sample_size": 4, "block_out_channels": (32,), "layers_per_block": 1, "cross_attention_dim": 8}
UNET |= {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
VAE = {"block_out_channels": (8, 8), "norm_num_groups": 4, "sample_size": 8}
VAE |= {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
TEXT = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
PROMPTS = ["red apple", "house", "cat face", "rocket", "a face"]  # more than the exported ids.npy has
X0 = normal(0, len(PROMPTS), 4, 4, 4)
SCHEDULER = json.loads((Path(pipeline.locate("openmoji")) / "scheduler" / "scheduler_config.json").read_text())


def configured(**fields):
    config = read_config("export")
    config.update(fields)
    return config


def random_weights(net, seed):
    """Without compiling `net.init`; biases and scales are random too, so that a wrong one shows."""
    random = np.random.default_rng(seed)

    def draw(name, shape):
        std = 0.1 if len(shape) < 2 else np.prod(shape[:-1]) ** -0.5
        return np.float32(std * random.standard_normal(shape) + name.endswith("scale"))

    return {name: draw(name, p.shape) for name, p in net.shapes.items()}


@pytest.fixture(scope="module")
def teacher():
    tokenizer = Tokenizer.from_pretrained(pipeline.locate("openmoji"))
    length, end = tokenizer.model_max_length, tokenizer.eos_id
    text = {"vocab_size": len(tokenizer.vocab), "max_position_embeddings": length, "eos_token_id": end}
    nets = {
        "unet": UNet2DConditionModel.from_config(UNET | {"attention_head_dim": 2}),
        "vae": AutoencoderKL.from_config(VAE),
        "text_encoder": CLIPTextModel.from_config(TEXT | text),
    }
    params = {name: random_weights(net, seed) for seed, (name, net) in enumerate(nets.items())}
    return pipeline.Pipeline(nets, params, tokenizer, SCHEDULER, pretrain_diffusion.INDEX)


@pytest.fixture(scope="module")
def flow(teacher):
    """The weights of the run's moving average."""
    return dataclasses.replace(teacher, params=teacher.params | {"unet": random_weights(teacher.nets["unet"], 100)})


@pytest.fixture(scope="module")
def run(teacher, flow, tmp_path_factory):
    """A run of `distill` that was killed after a checkpoint: it has only checkpoints, and its teacher is elsewhere."""
    folder = tmp_path_factory.mktemp("run")
    pipeline.save(teacher, folder / "teacher")
    config = read_config("distill").to_dict()
    config["pairs"]["model"] = str(folder / "teacher")
    schedule = optim.make_schedule("constant", peak=1e-3, warmup_steps=1)
    optimizer = optim.make_optimizer(schedule, b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.0, clip=1.0)
    saved = dataclasses.replace(state.create(teacher.params["unet"], optimizer), ema=flow.params["unet"])
    checkpoints = Checkpoints(folder / "distill" / "checkpoints", keep_last=1, keep_every=0)
    checkpoints.save(7, saved, {}, config)
    checkpoints.close()
    return folder / "distill"


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """All formats of that run."""
    workdir = tmp_path_factory.mktemp("out")
    main.run(configured(model=str(run)), str(workdir))
    return workdir / "export"


@dataclasses.dataclass
class Ours:
    """The flow as this package computes it, each part compiled once."""

    pipe: pipeline.Pipeline

    def __post_init__(self):
        self.ids = self.pipe.tokenizer(PROMPTS)
        self.text = np.asarray(self.run("text_encoder", self.ids).last_hidden_state)
        self.velocity = jax.jit(self.pipe.nets["unet"].apply)
        self.decode = jax.jit(lambda Z: self.run("vae", Z, method="decode"))

    def run(self, name, *inputs, **options):
        return self.pipe.nets[name].apply(self.pipe.params[name], *inputs, **options)

    def latents(self, N, X0=X0):
        """The released loop: Z += v(Z, 1000·(1 − i/N)) / N."""
        Z = X0
        for i in range(N):
            Z = Z + self.velocity(self.pipe.params["unet"], Z, np.float32(1000 * (1 - i / N)), self.text) / N
        return np.asarray(Z)

    def images(self, X0=X0):
        """One-step images, integers from 0 to 255."""
        return np.asarray(images.to_uint8(self.decode(self.latents(1, X0))), int)


@pytest.fixture(scope="module")
def ours(flow):
    return Ours(flow)


def run_python(program, cwd):
    """Runs a program that must load neither this package nor flax nor torch; returns its output."""
    forbidden = "{'instaflow_jax', 'flax', 'torch'} & sys.modules.keys()"
    done = subprocess.run(
        [sys.executable, "-c", f"{program}\nimport sys\nassert not {forbidden}, {forbidden}"],
        cwd=cwd,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---------------------------------------------------------------- other programs


def quoted(exported, name):
    """The code in the card for one format, to be run in the export's folder."""
    section = (exported / "README.md").read_text().split(f"`{name}/`:")[1]
    return section.split("```python\n")[1].split("```")[0]


@pytest.mark.slow
def test_orbax_alone_restores_the_moving_average(exported, flow, tmp_path):
    lines = quoted(exported, "orbax")
    assert len(lines.strip().splitlines()) == 3
    save = (
        "import numpy as np\nnp.savez({!r}, **{{f'{{n}}/{{k}}': v for n, p in params.items() for k, v in p.items()}})"
    )
    run_python(lines + save.format(str(tmp_path / "params.npz")), exported)
    got, want = np.load(tmp_path / "params.npz"), {f"{n}/{k}": v for n, p in flow.params.items() for k, v in p.items()}
    assert set(got) == set(want)
    worst = max(np.abs(got[key] - want[key]).max() for key in want)
    print(f"orbax alone: largest difference {worst}")
    assert worst == 0


@pytest.fixture(scope="module")
def stock(exported, torch):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(exported / "diffusers")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(stock, torch, N, output_type):
    latents = torch.tensor(X0.transpose(0, 3, 1, 2))
    return stock(PROMPTS, num_inference_steps=N, guidance_scale=1.0, latents=latents, output_type=output_type).images


@pytest.mark.slow
@pytest.mark.parametrize("N", [1, 2, 4, 25])
def test_stock_diffusers_takes_our_steps(N, stock, ours, torch):
    got = generate(stock, torch, N, "latent").numpy().transpose(0, 2, 3, 1)
    print(f"stock diffusers, N={N}: relative difference of latents {relative(got, ours.latents(N)):.1e}")
    assert relative(got, ours.latents(N)) < 5e-6


@pytest.mark.slow
def test_stock_diffusers_generates_our_one_step_images(stock, ours, torch):
    got = generate(stock, torch, 1, "np")
    want = np.clip(np.asarray(ours.decode(ours.latents(1))) / 2 + 0.5, 0, 1)
    print(f"stock diffusers, N=1: relative difference of images {relative(got, want):.1e}")
    assert relative(got, want) < 5e-6 and want.std() > 0.05


@pytest.mark.slow
def test_the_stock_directory_loads_as_the_same_flow(exported, ours):
    again = pipeline.load(str(exported / "diffusers"), variant=None, attention="xla")
    dynamics = sampling.read_dynamics(again.scheduler, again.index, "auto")
    solve = jax.jit(sampling.make_solve(again.nets["unet"].apply, dynamics, "euler", 3, 1.0))
    assert relative(solve(again.params["unet"], X0, ours.text, ours.text), ours.latents(3)) < 5e-6


@pytest.mark.slow
def test_the_code_in_the_card_for_diffusers_runs(exported, torch, tmp_path, monkeypatch):
    (tmp_path / "quoted.py").write_text(quoted(exported, "diffusers"))
    monkeypatch.chdir(tmp_path)
    Path("diffusers").symlink_to(exported / "diffusers")
    runpy.run_path("quoted.py")
    assert Image.open("apple.png").size == (8, 8)


@pytest.mark.slow
def test_ten_lines_of_jax_and_numpy_generate_our_images(exported, ours, tmp_path):
    folder = Path(shutil.copytree(exported / "stablehlo", tmp_path / "elsewhere"))
    assert len(np.load(folder / "ids.npy")) != len(ours.ids)
    np.save(folder / "ids.npy", ours.ids)
    run_python("import runpy, sys\nsys.argv = ['draw.py', '3']\nrunpy.run_path('draw.py')", folder)
    made = np.load(folder / "images.npz")
    want = ours.images(made["noise"])
    print(f"StableHLO: largest difference {np.abs(made['images'] - want).max()} of 255 levels, batch {len(want)}")
    assert np.abs(made["images"] - want).max() <= 1 and want.std() > 10
    header, pixels = (folder / "4.ppm").read_bytes().split(b"\n", 1)
    assert header == b"P6 8 8 255" and pixels == made["images"][4].tobytes()
    statements = [line for line in (folder / "draw.py").read_text().splitlines() if line and "import" not in line]
    assert len(statements) <= 15  # ten lines, four that check the files, and the docstring


@pytest.mark.slow
def test_the_program_runs_on_every_platform_and_contains_no_weights(exported):
    program = jax_export.deserialize((exported / "stablehlo" / "one_step.jaxexport").read_bytes())
    assert program.platforms == ("cpu", "cuda", "tpu")
    weights = np.load(exported / "stablehlo" / "weights.npz")
    assert len(program.serialize()) < sum(weights[key].nbytes for key in weights)
    assert not any(key.startswith("vae/encoder.") for key in weights)
    assert all(array.flags.c_contiguous or array.ndim < 2 for array in (weights[key] for key in weights))


@pytest.mark.slow
@with_flax_classes
def test_the_flax_classes_of_diffusers_take_our_step(exported, ours, torch):
    from diffusers import FlaxAutoencoderKL, FlaxUNet2DConditionModel
    from transformers import FlaxCLIPTextModel

    folder = exported / "msgpack"
    text = FlaxCLIPTextModel.from_pretrained(folder / "text_encoder")(ours.ids).last_hidden_state
    unet, params = FlaxUNet2DConditionModel.from_pretrained(str(folder), subfolder="unet")
    Z, timestep = jnp.asarray(X0.transpose(0, 3, 1, 2)), jnp.full(len(X0), 1000.0)
    Z = Z + jax.jit(unet.apply)({"params": params}, Z, timestep, text).sample
    vae, params = FlaxAutoencoderKL.from_pretrained(str(folder), subfolder="vae")
    decode = jax.jit(lambda Z: vae.apply({"params": params}, Z / 0.18215, method=vae.decode).sample)
    got = np.asarray(decode(Z.transpose(0, 2, 3, 1))).transpose(0, 2, 3, 1)  # it takes 4 last as NHWC
    want = ours.decode(ours.latents(1))
    print(
        f"Flax classes: relative difference of text {relative(text, ours.text):.1e}, images {relative(got, want):.1e}"
    )
    assert relative(text, ours.text) < 1e-5
    assert relative(got, want) < 2e-3  # their GELU is the tanh approximation


# ---------------------------------------------------------------- sources


def small(source, **fields):
    return configured(**({"model": str(source), "formats": ("diffusers",)} | fields))


@pytest.mark.slow
def test_params_in_the_released_convention(run, teacher, tmp_path):
    main.run(small(run, weights="params", convention="released"), str(tmp_path))
    again = pipeline.load(str(tmp_path / "export" / "diffusers"), variant=None, attention="xla")
    assert all(np.array_equal(again.params["unet"][key], p) for key, p in teacher.params["unet"].items())
    assert sampling.read_dynamics(again.scheduler, again.index, "auto") == sampling.Flow(1, 1000)
    assert again.scheduler == SCHEDULER


@pytest.mark.slow
def test_a_run_of_version_0_1_is_exported(run, teacher, flow, tmp_path):
    """Its saved config has other field names, and lacks `kernels`; it has no checksums."""
    old = Path(shutil.copytree(run, tmp_path / "old"))
    (old / "checkpoints" / "7" / "checksums.json").unlink()
    path = old / "checkpoints" / "7" / "config" / "metadata"
    config = json.loads(path.read_text())
    names = {"init_from": "start", "output": "into", "pairs_folder": "pairs_in", "prompt_dropout": "drop"}
    config |= {before: config.pop(name) for name, before in names.items()}
    config["schedule"]["kind"] = config["schedule"].pop("name")
    config |= {"start": str(run.parent / "teacher"), "model": "nowhere"}
    del config["kernels"]
    path.write_text(json.dumps(config))
    main.run(small(old), str(tmp_path))
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "export" / "diffusers", "unet")[1]
    assert np.array_equal(unet["conv_in.kernel"], flow.params["unet"]["conv_in.kernel"])
    card = (tmp_path / "export" / "README.md").read_text()
    assert f"distill, from the weights of `{run.parent / 'teacher'}`" in card and ", cosine, after" in card


@pytest.mark.slow
def test_an_export_of_a_stock_export_is_the_flow_it_came_from(exported, flow, tmp_path):
    main.run(small(exported / "diffusers", convention="released"), str(tmp_path))
    again = UNet2DConditionModel.from_pretrained(tmp_path / "export" / "diffusers", "unet")[1]
    for key, p in flow.params["unet"].items():
        np.testing.assert_allclose(again[key], p, rtol=3e-7, err_msg=key)
    card = (tmp_path / "export" / "README.md").read_text()
    assert "license: cc-by-sa-4.0" in card and "OpenMoji" in card and "exponential moving average, decay" in card


def test_a_teacher_is_exported_unchanged_and_has_no_one_step_program(run, teacher, tmp_path):
    main.run(small(run.parent / "teacher"), str(tmp_path))
    again = pipeline.load(str(tmp_path / "export" / "diffusers"), variant=None, attention="xla")
    assert again.scheduler == SCHEDULER
    assert np.array_equal(again.params["unet"]["conv_out.kernel"], teacher.params["unet"]["conv_out.kernel"])
    with pytest.raises(ValueError, match="is a teacher"):
        main.run(small(run.parent / "teacher", formats=("stablehlo",)), str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_the_index_does_not_name_parts_that_are_not_written(flow, torch, tmp_path):
    """SD 1.5's index names a safety checker; a stock pipeline would look for the folder of that."""
    from diffusers import StableDiffusionPipeline

    filters = {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "requires_safety_checker": True,
    }
    source = tmp_path / "source"
    pipeline.save(dataclasses.replace(flow, index=flow.index | filters), source)
    main.run(small(source, dynamics="flow"), str(tmp_path))
    assert StableDiffusionPipeline.from_pretrained(tmp_path / "export" / "diffusers").safety_checker is None


def test_a_missing_run_is_distilled_first(run, tmp_path, monkeypatch, capsys):
    def train(config, workdir):
        assert config.stage == "distill"
        shutil.copytree(run, Path(workdir) / "distill")

    monkeypatch.setattr(distill, "run", train)
    for replace in (False, True):
        main.run(small("", replace=replace), str(tmp_path))
    assert capsys.readouterr().out.count("distill first") == 1
    assert (tmp_path / "export" / "diffusers" / "model_index.json").is_file()


# ---------------------------------------------------------------- all or nothing


@pytest.mark.slow
def test_an_export_is_replaced_only_on_request_and_only_by_a_complete_one(run, tmp_path, monkeypatch):
    main.run(small(run), str(tmp_path))
    before = (tmp_path / "export" / "export.json").read_bytes()
    with pytest.raises(FileExistsError, match=r"config\.replace=true"):
        main.run(small(run), str(tmp_path))

    def fail(source, directory, options):
        directory.mkdir()
        raise OSError("disk full")

    monkeypatch.setitem(export_formats.WRITERS, "orbax", fail)
    with pytest.raises(OSError, match="disk full"):
        main.run(small(run, formats=("diffusers", "orbax"), replace=True), str(tmp_path))
    assert (tmp_path / "export" / "export.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    (tmp_path / "export").rename(tmp_path / "export.old")  # as if killed between the two renames
    (tmp_path / "export.tmp" / "diffusers").mkdir(parents=True)
    main.run(small(run, formats=("msgpack",), replace=True), str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert not (tmp_path / "export" / "diffusers").exists()


def test_a_directory_that_is_not_an_export_is_never_replaced(run, tmp_path):
    shutil.copytree(run, tmp_path / "export")
    with pytest.raises(FileExistsError, match="is not an export"):
        main.run(small(run, replace=True), str(tmp_path))
    assert (tmp_path / "export" / "checkpoints").is_dir()


@pytest.mark.slow
def test_other_users_can_read_every_file(exported):
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in exported.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "fields,error,words",
    [
        ({"formats": ("gguf",)}, ValueError, "must name some of orbax, diffusers, stablehlo, msgpack, single_file"),
        ({"formats": ()}, ValueError, "must name some of"),
        ({"weights": "best"}, ValueError, "config.weights='best' is not one of ema, params"),
        ({"convention": "sd"}, ValueError, "config.convention='sd' is not one of stock, released"),
        ({"dtype": "int8"}, ValueError, "config.dtype='int8'"),
        ({"attention": "cudnn"}, ValueError, "config.attention='cudnn'"),
        ({"loras": "style.safetensors"}, ValueError, "is a run"),
        ({"model": "nowhere"}, FileNotFoundError, "'nowhere' is neither a directory nor a hub id"),
    ],
)
def test_wrong_settings_raise_one_clear_message(fields, error, words, run, tmp_path):
    with pytest.raises(error) as raised:
        main.run(small(run, **fields), str(tmp_path))
    assert words in str(raised.value)
    assert not (tmp_path / "export").exists()


def test_a_run_of_another_stage_is_rejected(tmp_path, monkeypatch):
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    monkeypatch.setattr(checkpoint, "load_config", lambda directory, step: {"stage": "pretrain"})
    with pytest.raises(ValueError, match="run of stage 'pretrain'"):
        main.run(small(tmp_path), str(tmp_path))


# ---------------------------------------------------------------- the card


def test_the_card_has_the_recipe_and_the_measured_table(run, tmp_path):
    (tmp_path / "evaluate").mkdir()
    (tmp_path / "evaluate" / "table.md").write_text("| N | FID |\n|---|---|\n| 1 | 12.5 |\n")
    main.run(small(run), str(tmp_path))
    card = (tmp_path / "export" / "README.md").read_text()
    for words in (
        "the weights of step 7",
        "exponential moving average, decay",
        f"distill, from the weights of `{run.parent / 'teacher'}`",
        "| 1 | 12.5 |",
        "num_inference_steps=1, guidance_scale=1.0",
        '"distance": "l2"',
        "| Prompts | `openmoji` |",
    ):
        assert words in card, words
    assert "orbax" not in card.split("## Use")[1].split("## Resolved")[0]


@pytest.mark.slow
def test_a_card_without_measurements_says_so(exported):
    assert "## Measured\n\nNot measured." in (exported / "README.md").read_text()


@pytest.mark.parametrize(
    "model,licence,source",
    [
        ("openmoji", "cc-by-sa-4.0", "openmoji"),
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", "creativeml-openrail-m", None),
        ("stabilityai/stable-diffusion-2-1", "openrail++", None),
        ("XCLiu/2_rectified_flow_from_sd_1_5", "cc-by-nc-4.0", None),
        ("XCLiu/instaflow_0_9B_from_sd_1_5", "cc-by-nc-4.0", None),
        ("someone/instaflow_jax", "other", None),
    ],
)
def test_the_licence_is_inherited_through_the_runs(model, licence, source, teacher, monkeypatch):
    """distill ← reflow/export ← its config's model."""
    runs = {
        "a/distill": {"init_from": "", "model": "", "pairs": {"model": "a/reflow/export"}},
        "a/reflow/export": {"model": model, "pairs": {"model": model}},
    }
    monkeypatch.setattr(export_licence, "run_config", lambda name: runs.get(name, {}))
    distilled = export_source.Source("a/distill", teacher, sampling.Flow(1, 1000), runs["a/distill"], 1)
    found = export_licence.licence(distilled)
    assert (found.name, found.source) == (licence, model)
    text = export_licence.legal(dataclasses.replace(distilled, run={}), found)
    assert ("OpenMoji" in text) == bool(source)


def test_the_card_of_a_flow_of_several_steps_draws_in_as_many(teacher):
    run = {"stage": "progressive", "N": 4, "model": "openmoji", "pairs": {"model": "openmoji"}}
    options = export_formats.Options(("diffusers",), "stock", "", "float32", "")
    source = export_source.Source("a/progressive_4", teacher, sampling.Flow(1, 1000), run, 1)
    assert "num_inference_steps=4, guidance_scale=1.0" in export_card.use_diffusers(source, options)
    source = dataclasses.replace(source, run={"stage": "distill"})
    assert "num_inference_steps=1, guidance_scale=1.0" in export_card.use_diffusers(source, options)


# ---------------------------------------------------------------- damage


@pytest.mark.slow
@pytest.mark.parametrize("name", ["diffusers", "msgpack"])
def test_a_flipped_bit_in_exported_weights_is_named(name, exported, tmp_path):
    folder = Path(shutil.copytree(exported / name, tmp_path / name))
    loading.load(str(folder), loading.WeightOptions())
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        before = path.read_bytes()
        flip(path)
        with pytest.raises(ValueError, match=f"{re.escape(str(path))} is damaged.*make or copy") as refused:
            loading.load(str(folder), loading.WeightOptions())
        assert "\n" not in str(refused.value)
        path.write_bytes(before)


@pytest.mark.slow
def test_a_flipped_bit_in_the_program_or_the_manifest_is_named(exported, tmp_path):
    folder = Path(shutil.copytree(exported, tmp_path / "export"))
    listed = files.read_json(folder / files.CHECKSUMS)["files"]
    assert {"README.md", "export.json", "stablehlo/weights.npz", "stablehlo/checksums.json"} <= listed.keys()
    assert any(name.startswith("orbax/") for name in listed) and files.find_damage(folder) is None
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size):
        before = path.read_bytes()
        flip(path)
        assert str(path) in files.find_damage(folder)
        path.write_bytes(before)
    flip(folder / "export.json")
    with pytest.raises(ValueError, match=r"export\.json is damaged"):
        export_source.run_config(str(folder / "diffusers"))
    flip(folder / "stablehlo" / "weights.npz")
    done = subprocess.run(
        [sys.executable, folder / "stablehlo" / "draw.py"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "weights.npz is damaged" in done.stderr and "Traceback" not in done.stderr


def test_a_damaged_checkpoint_is_not_exported(run, tmp_path):
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    path = max((folder / "checkpoints" / "7" / "ema").rglob("*"), key=lambda path: path.stat().st_size)
    flip(path)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} is damaged"):
        main.run(configured(model=str(folder)), str(tmp_path))
    assert not (tmp_path / "export").exists()
