"""Stage `export`: every form read by its foreign reader, the differences printed; refusals, cards, kills."""

import dataclasses
import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import normal, relative
from jax import export as jax_export
from PIL import Image

from instaflow_jax import main, pipeline, sampling
from instaflow_jax.infra.checkpoint import Checkpoints
from instaflow_jax.models.clip import CLIPTextModel
from instaflow_jax.models.unet import UNet2DConditionModel
from instaflow_jax.models.vae import AutoencoderKL
from instaflow_jax.stages import distill
from instaflow_jax.stages.export import formats as export_formats
from instaflow_jax.stages.pretrain import diffusion as pretrain_diffusion
from instaflow_jax.train import optim, state
from instaflow_jax.weights.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
NETS = {
    "unet": (
        UNet2DConditionModel,
        {
            "sample_size": 4,
            "block_out_channels": (32,),
            "layers_per_block": 1,
            "cross_attention_dim": 8,
            "down_block_types": ("CrossAttnDownBlock2D",),
            "up_block_types": ("CrossAttnUpBlock2D",),
            "attention_head_dim": 2,
        },
    ),
    "vae": (
        AutoencoderKL,
        {
            "block_out_channels": (8, 8),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "norm_num_groups": 4,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "sample_size": 8,
        },
    ),
    "text_encoder": (
        CLIPTextModel,
        {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2},
    ),
}
PROMPTS = ["red apple", "house", "cat face", "rocket", "a face"]  # not the number that is exported with the program
X0 = normal(0, len(PROMPTS), 4, 4, 4)
SCHEDULER = json.loads((Path(pipeline.locate("openmoji")) / "scheduler" / "scheduler_config.json").read_text())


def read(**fields):
    config = runpy.run_path(str(ROOT / "configs" / "export.py"))["get_config"]()
    config.update(fields)
    return config


def draw_weights(nets, seed):
    """Random weights, gaps between them filled, so that a wrong bias or scale shows."""
    drawn = {}
    for i, (name, net) in enumerate(nets.items()):
        params = jax.device_get(net.init(jax.random.key(seed + i)))
        noise = normal(seed + 10 + i, sum(p.size for p in params.values()))
        cuts = np.split(noise, np.cumsum([p.size for p in params.values()])[:-1])
        drawn[name] = {key: p + 0.1 * cut.reshape(p.shape) for (key, p), cut in zip(params.items(), cuts, strict=True)}
    return drawn


@pytest.fixture(scope="module")
def teacher():
    tokenizer = Tokenizer.from_pretrained(pipeline.locate("openmoji"))
    text = {
        "vocab_size": len(tokenizer.vocab),
        "max_position_embeddings": tokenizer.model_max_length,
        "eos_token_id": tokenizer.eos_id,
    }
    nets = {name: cls.from_config(raw | (text if name == "text_encoder" else {})) for name, (cls, raw) in NETS.items()}
    return pipeline.Pipeline(nets, draw_weights(nets, 0), tokenizer, SCHEDULER, pretrain_diffusion.INDEX)


@pytest.fixture(scope="module")
def flow(teacher):
    """What the run's running mean is."""
    unet = draw_weights({"unet": teacher.nets["unet"]}, 100)["unet"]
    return dataclasses.replace(teacher, params=teacher.params | {"unet": unet})


@pytest.fixture(scope="module")
def run(teacher, flow, tmp_path_factory):
    """A run of `distill` that was broken off after a checkpoint: nothing but checkpoints, its teacher elsewhere."""
    folder = tmp_path_factory.mktemp("run")
    pipeline.save(teacher, folder / "teacher")
    config = runpy.run_path(str(ROOT / "configs" / "distill.py"))["get_config"]().to_dict()
    config["pairs"]["model"] = str(folder / "teacher")
    schedule = optim.make_schedule("constant", peak=1e-3, warmup_steps=1)
    optimizer = optim.make_optimizer(schedule, b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.0, clip=1.0)
    now = dataclasses.replace(state.create(teacher.params["unet"], optimizer), ema=flow.params["unet"])
    checkpoints = Checkpoints(folder / "distill" / "checkpoints", keep_last=1, keep_every=0)
    checkpoints.save(7, now, {}, config)
    checkpoints.close()
    return folder / "distill"


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """All formats of that run."""
    workdir = tmp_path_factory.mktemp("out")
    main.run(read(model=str(run)), str(workdir))
    return workdir / "export"


@dataclasses.dataclass
class Ours:
    """The flow as this package runs it, each part compiled once."""

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

    def pictures(self, X0=X0):
        """One-step pictures, whole numbers from 0 to 255."""
        return np.asarray(images.to_uint8(self.decode(self.latents(1, X0))), int)


@pytest.fixture(scope="module")
def ours(flow):
    return Ours(flow)


def python(program, cwd):
    """Runs a program that must not load this package or its framework, in a folder where it cannot find it."""
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


# ---------------------------------------------------------------- foreign readers


def quoted(exported, form):
    """The code that the card quotes for one form, fit to be run in the export's folder."""
    section = (exported / "README.md").read_text().split(f"`{form}/`:")[1]
    return section.split("```python\n")[1].split("```")[0]


def test_orbax_alone_restores_the_running_mean(exported, flow, tmp_path):
    lines = quoted(exported, "orbax")
    assert len(lines.strip().splitlines()) == 3
    save = (
        "import numpy as np\nnp.savez({!r}, **{{f'{{n}}/{{k}}': v for n, p in params.items() for k, v in p.items()}})"
    )
    python(lines + save.format(str(tmp_path / "params.npz")), exported)
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


@pytest.mark.parametrize("N", [1, 2, 4, 25])
def test_the_stock_diffusers_pipeline_takes_our_steps(N, stock, ours, torch):
    got = (
        stock(
            PROMPTS,
            num_inference_steps=N,
            guidance_scale=1.0,
            latents=torch.tensor(X0.transpose(0, 3, 1, 2)),
            output_type="latent",
        )
        .images.numpy()
        .transpose(0, 2, 3, 1)
    )
    print(f"stock diffusers, N={N}: relative difference of latents {relative(got, ours.latents(N)):.1e}")
    assert relative(got, ours.latents(N)) < 5e-6


def test_the_stock_diffusers_pipeline_draws_our_one_step_picture(stock, ours, torch):
    got = stock(
        PROMPTS,
        num_inference_steps=1,
        guidance_scale=1.0,
        latents=torch.tensor(X0.transpose(0, 3, 1, 2)),
        output_type="np",
    ).images
    want = np.clip(np.asarray(ours.decode(ours.latents(1))) / 2 + 0.5, 0, 1)
    print(f"stock diffusers, N=1: relative difference of pictures {relative(got, want):.1e}")
    assert relative(got, want) < 5e-6 and want.std() > 0.05


def test_we_read_the_stock_directory_as_the_same_flow(exported, ours):
    again = pipeline.load(str(exported / "diffusers"), variant=None, attention="xla")
    dynamics = sampling.read_dynamics(again.scheduler, again.index, "auto")
    solve = jax.jit(sampling.make_solve(again.nets["unet"].apply, dynamics, "euler", 3, 1.0))
    assert relative(solve(again.params["unet"], X0, ours.text, ours.text), ours.latents(3)) < 5e-6


def test_the_quoted_lines_for_diffusers_run(exported, torch, tmp_path, monkeypatch):
    (tmp_path / "quoted.py").write_text(quoted(exported, "diffusers"))
    monkeypatch.chdir(tmp_path)
    Path("diffusers").symlink_to(exported / "diffusers")
    runpy.run_path("quoted.py")
    assert Image.open("apple.png").size == (8, 8)


def test_ten_lines_of_jax_and_numpy_draw_our_pictures(exported, ours, tmp_path):
    folder = Path(shutil.copytree(exported / "stablehlo", tmp_path / "elsewhere"))
    assert len(np.load(folder / "ids.npy")) != len(ours.ids)
    np.save(folder / "ids.npy", ours.ids)
    python("import runpy, sys\nsys.argv = ['draw.py', '3']\nrunpy.run_path('draw.py')", folder)
    made = np.load(folder / "pictures.npz")
    want = ours.pictures(made["noise"])
    print(f"StableHLO: largest difference {np.abs(made['pictures'] - want).max()} of 255 levels, batch {len(want)}")
    assert np.abs(made["pictures"] - want).max() <= 1 and want.std() > 10
    header, pixels = (folder / "4.ppm").read_bytes().split(b"\n", 1)
    assert header == b"P6 8 8 255" and pixels == made["pictures"][4].tobytes()
    statements = [line for line in (folder / "draw.py").read_text().splitlines() if line and "import" not in line]
    assert len(statements) <= 11  # ten and the docstring


def test_the_program_is_for_every_platform_and_holds_no_weights(exported):
    program = jax_export.deserialize((exported / "stablehlo" / "one_step.jaxexport").read_bytes())
    assert program.platforms == ("cpu", "cuda", "tpu")
    weights = np.load(exported / "stablehlo" / "weights.npz")
    assert len(program.serialize()) < sum(weights[key].nbytes for key in weights)
    assert not any(key.startswith("vae/encoder.") for key in weights)
    assert all(array.flags.c_contiguous or array.ndim < 2 for array in (weights[key] for key in weights))


def test_the_old_flax_classes_take_our_step(exported, ours, torch):
    from diffusers import FlaxAutoencoderKL, FlaxUNet2DConditionModel
    from transformers import FlaxCLIPTextModel

    folder = exported / "msgpack"
    text = FlaxCLIPTextModel.from_pretrained(folder / "text_encoder")(ours.ids).last_hidden_state
    unet, params = FlaxUNet2DConditionModel.from_pretrained(str(folder), subfolder="unet")
    Z, clock = jnp.asarray(X0.transpose(0, 3, 1, 2)), jnp.full(len(X0), 1000.0)
    Z = Z + jax.jit(unet.apply)({"params": params}, Z, clock, text).sample
    vae, params = FlaxAutoencoderKL.from_pretrained(str(folder), subfolder="vae")
    decode = jax.jit(lambda Z: vae.apply({"params": params}, Z / 0.18215, method=vae.decode).sample)
    got = np.asarray(decode(Z.transpose(0, 2, 3, 1))).transpose(0, 2, 3, 1)  # it guesses the layout: four last is NHWC
    want = ours.decode(ours.latents(1))
    print(
        f"old Flax classes: relative difference of text {relative(text, ours.text):.1e}, pictures {relative(got, want):.1e}"
    )
    assert relative(text, ours.text) < 1e-5
    assert relative(got, want) < 2e-3  # their GELU is the tanh approximation


# ---------------------------------------------------------------- what is exported


def small(source, **fields):
    return read(**({"model": str(source), "formats": ("diffusers",)} | fields))


def test_params_and_the_released_convention(run, teacher, tmp_path):
    main.run(small(run, weights="params", convention="released"), str(tmp_path))
    again = pipeline.load(str(tmp_path / "export" / "diffusers"), variant=None, attention="xla")
    assert all(np.array_equal(again.params["unet"][key], p) for key, p in teacher.params["unet"].items())
    assert sampling.read_dynamics(again.scheduler, again.index, "auto") == sampling.Flow(1, 1000)
    assert again.scheduler == SCHEDULER


def test_an_export_of_a_stock_export_is_the_flow_it_came_from(exported, flow, tmp_path):
    main.run(small(exported / "diffusers", convention="released"), str(tmp_path))
    again = UNet2DConditionModel.from_pretrained(tmp_path / "export" / "diffusers", "unet")[1]
    for key, p in flow.params["unet"].items():
        np.testing.assert_allclose(again[key], p, rtol=3e-7, err_msg=key)
    card = (tmp_path / "export" / "README.md").read_text()
    assert "license: cc-by-sa-4.0" in card and "OpenMoji" in card and "running mean, decay" in card


def test_a_teacher_is_exported_as_it_is_and_has_no_one_step_program(run, teacher, tmp_path):
    main.run(small(run.parent / "teacher"), str(tmp_path))
    again = pipeline.load(str(tmp_path / "export" / "diffusers"), variant=None, attention="xla")
    assert again.scheduler == SCHEDULER
    assert np.array_equal(again.params["unet"]["conv_out.kernel"], teacher.params["unet"]["conv_out.kernel"])
    with pytest.raises(ValueError, match="is a teacher"):
        main.run(small(run.parent / "teacher", formats=("stablehlo",)), str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def test_parts_that_are_not_written_are_not_asked_for(flow, torch, tmp_path):
    """SD 1.5's index names a safety checker; a stock pipeline would look for its folder."""
    from diffusers import StableDiffusionPipeline

    filters = {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "requires_safety_checker": True,
    }
    source = tmp_path / "source"
    pipeline.save(dataclasses.replace(flow, index=flow.index | filters), source)
    main.run(small(source, kind="flow"), str(tmp_path))
    assert StableDiffusionPipeline.from_pretrained(tmp_path / "export" / "diffusers").safety_checker is None


def test_an_absent_run_is_distilled_first(run, tmp_path, monkeypatch, capsys):
    def train(config, workdir):
        assert config.stage == "distill"
        shutil.copytree(run, Path(workdir) / "distill")

    monkeypatch.setattr(distill, "run", train)
    for replace in (False, True):
        main.run(small("", replace=replace), str(tmp_path))
    assert capsys.readouterr().out.count("distill first") == 1
    assert (tmp_path / "export" / "diffusers" / "model_index.json").is_file()


# ---------------------------------------------------------------- whole or not at all


def test_what_is_there_is_replaced_only_when_asked_and_only_by_a_whole_export(run, tmp_path, monkeypatch):
    main.run(small(run), str(tmp_path))
    before = (tmp_path / "export" / "export.json").read_bytes()
    with pytest.raises(FileExistsError, match="config.replace=true"):
        main.run(small(run), str(tmp_path))

    def fail(source, directory, config):
        directory.mkdir()
        raise OSError("disk full")

    monkeypatch.setitem(export_formats.WRITERS, "orbax", fail)
    with pytest.raises(OSError, match="disk full"):
        main.run(small(run, formats=("diffusers", "orbax"), replace=True), str(tmp_path))
    assert (tmp_path / "export" / "export.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    (tmp_path / "export").rename(tmp_path / "export.old")  # as a kill in the middle of the exchange leaves it
    (tmp_path / "export.tmp" / "diffusers").mkdir(parents=True)
    main.run(small(run, formats=("msgpack",), replace=True), str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert not (tmp_path / "export" / "diffusers").exists()


def test_a_directory_that_is_no_export_is_never_replaced(run, tmp_path):
    shutil.copytree(run, tmp_path / "export")
    with pytest.raises(FileExistsError, match="is no export"):
        main.run(small(run, replace=True), str(tmp_path))
    assert (tmp_path / "export" / "checkpoints").is_dir()


def test_others_may_read_every_file(exported):
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in exported.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "fields,error,words",
    [
        ({"formats": ("onnx",)}, ValueError, "must name some of orbax, diffusers, stablehlo, msgpack"),
        ({"formats": ()}, ValueError, "must name some of"),
        ({"weights": "best"}, ValueError, "config.weights='best' is not one of ema, params"),
        ({"convention": "sd"}, ValueError, "config.convention='sd' is not one of stock, released"),
        ({"dtype": "int8"}, ValueError, "config.dtype='int8'"),
        ({"attention": "cudnn"}, ValueError, "config.attention='cudnn'"),
        ({"loras": "style.safetensors"}, ValueError, "is a run"),
        ({"model": "nowhere"}, FileNotFoundError, "'nowhere' is neither a directory nor a hub id"),
    ],
)
def test_bad_settings_end_in_one_clear_message(fields, error, words, run, tmp_path):
    with pytest.raises(error) as raised:
        main.run(small(run, **fields), str(tmp_path))
    assert words in str(raised.value)
    assert not (tmp_path / "export").exists()


def test_a_run_of_another_stage_is_refused(tmp_path, monkeypatch):
    from instaflow_jax.infra import checkpoint

    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    monkeypatch.setattr(checkpoint, "load_config", lambda directory, step: {"stage": "pretrain"})
    with pytest.raises(ValueError, match="run of stage 'pretrain'"):
        main.run(small(tmp_path), str(tmp_path))


# ---------------------------------------------------------------- the card


def test_the_card_tells_the_recipe_and_the_measured_table(run, tmp_path):
    (tmp_path / "evaluate").mkdir()
    (tmp_path / "evaluate" / "table.md").write_text("| N | FID |\n|---|---|\n| 1 | 12.5 |\n")
    main.run(small(run), str(tmp_path))
    card = (tmp_path / "export" / "README.md").read_text()
    for words in (
        "those of step 7",
        "running mean, decay",
        f"distill, from the weights of `{run.parent / 'teacher'}`",
        "| 1 | 12.5 |",
        "num_inference_steps=1, guidance_scale=1.0",
        '"distance": "l2"',
        "| Prompts | `openmoji` |",
    ):
        assert words in card, words
    assert "orbax" not in card.split("## Use")[1].split("## Resolved")[0]


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
def test_the_licence_is_inherited_through_the_runs(model, licence, source, run, tmp_path, monkeypatch):
    """distill ← reflow/export ← its config's model."""
    from instaflow_jax.stages.export import card as export_card
    from instaflow_jax.stages.export import source as export_source

    runs = {
        "a/distill": {"start": "", "model": "", "pairs": {"model": "a/reflow/export"}},
        "a/reflow/export": {"model": model, "pairs": {"model": model}},
    }
    monkeypatch.setattr(export_card, "run_config", lambda name: runs.get(name, {}))
    found = export_card.licence(export_source.Source("a/distill", None, None, runs["a/distill"], 1))
    assert (found.name, found.source) == (licence, model)
    assert ("OpenMoji" in export_card.legal(export_source.Source("a/distill", None, None, {}, 1), found)) == bool(
        source
    )
