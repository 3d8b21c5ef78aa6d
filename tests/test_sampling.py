"""The released loop on the real UNet, pipelines on disk, and the `sample` stage from prompts to PNGs."""

import contextlib
import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from helpers import normal, randomize, references, relative
from PIL import Image

from instaflow_jax import main, pipeline, sampling, teacher
from instaflow_jax.infra import files
from instaflow_jax.models.unet import UNet2DConditionModel
from instaflow_jax.stages.common import fit, flow_training, loading
from instaflow_jax.stages.serve import models as serve_models
from instaflow_jax.weights.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
UNET = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "cross_attention_dim": 16,
    "attention_head_dim": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "norm_num_groups": 8,
    "sample_size": 8,
}
SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A complete Stable Diffusion of random weights, written by PyTorch diffusers and transformers."""
    torch = references()
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline
    from diffusers import UNet2DConditionModel as TorchUNet
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    folder, torch_tokenizer = (
        tmp_path_factory.mktemp("tiny"),
        CLIPTokenizer.from_pretrained(Path(pipeline.EMBEDDED) / "openmoji" / "tokenizer"),
    )
    torch.manual_seed(0)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(torch_tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=torch_tokenizer.model_max_length,
            eos_token_id=torch_tokenizer.eos_token_id,
        )
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        norm_num_groups=8,
        up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=16,
    )
    StableDiffusionPipeline(
        vae=randomize(vae),
        text_encoder=randomize(text),
        tokenizer=torch_tokenizer,
        unet=randomize(TorchUNet(**UNET)),
        scheduler=PNDMScheduler.from_config(SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(tiny, tmp_path):
    return Path(shutil.copytree(tiny, tmp_path / "tiny"))


def released_loop(torch, unet, X0, text, null, N, alpha):
    """The released sampler restated: timestep 1000·(1−t), [null, text] in one batch, guidance only above 1."""
    Z = X0
    for i in range(N):
        tau = torch.full((len(Z),), 1000.0 * (1 - i / N))
        if alpha > 1:
            both = unet(torch.cat([Z, Z]), torch.cat([tau, tau]), torch.cat([null, text])).sample
            v_null, v_text = both.chunk(2)
            v = v_null + alpha * (v_text - v_null)
        else:
            v = unet(Z, tau, text).sample
        Z = Z + v / N
    return Z


@pytest.mark.slow
@pytest.mark.parametrize("N,alpha", [(1, 1.0), (1, 1.5), (2, 1.0), (25, 1.5)])
def test_flow_equals_the_released_loop(N, alpha, torch, tmp_path):
    from diffusers import UNet2DConditionModel as TorchUNet

    reference = randomize(TorchUNet(**UNET))
    reference.save_pretrained(tmp_path)
    net, params = UNet2DConditionModel.from_pretrained(tmp_path)
    X0, text, negative = normal(0, 2, 8, 8, 4), normal(1, 2, 5, 16), normal(2, 1, 5, 16)
    with torch.no_grad():
        want = (
            released_loop(
                torch,
                reference,
                torch.tensor(X0.transpose(0, 3, 1, 2)),
                torch.tensor(text),
                torch.tensor(np.repeat(negative, 2, 0)),
                N,
                alpha,
            )
            .numpy()
            .transpose(0, 2, 3, 1)
        )
    solve = jax.jit(sampling.make_solve(net.apply, sampling.Flow(1, 1000), "euler", N, alpha))
    assert relative(solve(params, X0, text, negative), want) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("solver,scheduler", [("dpm_solver", "DPMSolverMultistepScheduler"), ("ddim", "DDIMScheduler")])
def test_teacher_equals_the_diffusers_pipeline(solver, scheduler, tiny, torch):
    import diffusers

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tiny)
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    X0 = normal(0, 2, 8, 8, 4)
    want = pipe(
        ["red apple", "house"],
        negative_prompt=["a face"] * 2,
        num_inference_steps=25,
        guidance_scale=3.0,
        latents=torch.tensor(X0.transpose(0, 3, 1, 2)),
        output_type="np",
    ).images
    ours = pipeline.load(str(tiny), variant=None, attention="xla")
    dynamics = sampling.read_dynamics(ours.scheduler, ours.index, "auto")
    assert isinstance(dynamics, teacher.Schedule)
    solve = sampling.make_solve(ours.nets["unet"].apply, dynamics, solver, 25, 3.0)
    generate = jax.jit(sampling.make_generate(ours.nets, solve))
    got, _ = generate(ours.params, ours.tokenizer(["red apple", "house"]), ours.tokenizer(["a face"]), X0)
    assert np.abs(np.asarray(got, int) - np.round(want * 255)).max() <= 1


@pytest.mark.slow
def test_weights_that_are_cast_once_give_the_same_bits(tiny):
    """bfloat16 with float32 weights, and with `inference_params`, which lack the encoder and hold half the bytes."""
    pipe = pipeline.load(str(tiny), variant=None, dtype="bfloat16", attention="auto")
    solve = sampling.make_solve(pipe.nets["unet"].apply, sampling.Flow(1, 1000), "euler", 2, 1.5)
    generate = jax.jit(sampling.make_generate(pipe.nets, solve))
    inputs = (
        pipe.tokenizer(["red apple", "house"]),
        pipe.tokenizer([""]),
        sampling.noise(np.arange(2), pipe.latent_shape),
    )
    cast = pipeline.inference_params(pipe.nets, pipe.params)
    images, finite = generate(pipe.params, *inputs)
    assert np.asarray(finite).all() and np.array_equal(images, generate(cast, *inputs)[0])
    size = lambda params: sum(p.nbytes for net in params.values() for p in net.values())  # noqa: E731
    assert size(cast) < 0.52 * size(pipe.params)
    assert not cast["vae"]["encoder.conv_in.kernel"].size and cast["unet"]["conv_norm_out.scale"].dtype == np.float32


def test_a_saved_pipeline_is_the_same_pipeline(tiny, tmp_path, torch):
    from diffusers import StableDiffusionPipeline

    ours = pipeline.load(str(tiny), variant=None, attention="xla")
    pipeline.save(ours, tmp_path / "again")
    again = pipeline.load(str(tmp_path / "again"), variant=None, attention="xla")
    for name, params in ours.params.items():
        for key, p in params.items():
            np.testing.assert_array_equal(again.params[name][key], p, err_msg=f"{name} {key}")
    assert (again.scheduler, again.index) == (ours.scheduler, ours.index)
    theirs = StableDiffusionPipeline.from_pretrained(tmp_path / "again")
    assert theirs.unet.config.cross_attention_dim == 16


def test_noise_depends_on_the_seed_alone():
    both = sampling.noise(np.array([3, 7]), (2, 2, 4))
    np.testing.assert_array_equal(both[1], sampling.noise(np.array([7]), (2, 2, 4))[0])
    assert np.abs(both[0] - both[1]).max() > 0.1


def test_slerp_keeps_the_norm_and_turns_evenly():
    A, B = np.split(np.asarray(sampling.noise(np.arange(6), (4, 4, 4))), 2)
    length = [np.linalg.norm(noise.reshape(3, -1), axis=1)[:, None, None, None] for noise in (A, B)]
    B = B * (length[0] / length[1])
    path = np.stack([np.asarray(sampling.slerp(A, B, position)) for position in (0, 0.25, 0.5, 0.75, 1)])
    np.testing.assert_array_equal(path[0], A)
    np.testing.assert_array_equal(path[-1], B)
    points = path.reshape(5, 3, -1).astype(np.float64)
    norms = np.linalg.norm(points, axis=-1)
    np.testing.assert_allclose(norms, np.broadcast_to(norms[0], norms.shape), rtol=1e-5)
    angles = np.arccos(np.sum(points[1:] * points[:-1], -1) / (norms[1:] * norms[:-1]))
    np.testing.assert_allclose(angles, np.broadcast_to(angles.mean(0), angles.shape), rtol=1e-4)
    np.testing.assert_allclose(sampling.slerp(A, A, 0.3), A, rtol=1e-6)  # one seed twice


@pytest.mark.parametrize(
    "scheduler,index,dynamics,want",
    [
        (SCHEDULER, "StableDiffusionPipeline", "auto", teacher.Schedule),
        (SCHEDULER, "StableDiffusionPipeline", "flow", sampling.Flow(1, 1000)),
        (SCHEDULER, "RectifiedFlowPipeline", "auto", sampling.Flow(1, 1000)),
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler"},
            "StableDiffusionPipeline",
            "auto",
            sampling.Flow(-1, 1000),
        ),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "flow_prediction", "flow_shift": 1.0},
            "StableDiffusionPipeline",
            "auto",
            sampling.Flow(-1, 1000),
        ),
    ],
)
def test_dynamics_are_what_the_scheduler_says(scheduler, index, dynamics, want):
    got = sampling.read_dynamics(scheduler, {"_class_name": index}, dynamics)
    assert got == want if isinstance(want, sampling.Flow) else isinstance(got, want)


def test_a_flow_of_either_sign_is_the_same_flow():
    def apply(params, Z, tau, context):
        return params * Z

    X0, text = normal(0, 1, 2, 2, 4), normal(1, 1, 3, 8)
    plus = sampling.make_solve(apply, sampling.Flow(1, 1000), "auto", 4, 1.0)(0.5, X0, text, text)
    minus = sampling.make_solve(apply, sampling.Flow(-1, 1000), "auto", 4, 1.0)(-0.5, X0, text, text)
    np.testing.assert_array_equal(plus, minus)
    np.testing.assert_allclose(plus, X0 * 1.125**4, rtol=1e-6)


# ---------------------------------------------------------------- the stage


def config(tiny, **fields):
    config = runpy.run_path(str(ROOT / "configs" / "sample.py"))["get_config"]()
    config.update({"model": str(tiny), "N": 2, "prompts": "red apple|house", "seeds": (5, 6, 7), "batch": 4} | fields)
    return config


@pytest.mark.slow
def test_stage_writes_images_and_a_grid(tiny, tmp_path):
    main.run(config(tiny), str(tmp_path))
    made = sorted(p.name for p in (tmp_path / "sample").iterdir())
    assert len(made) == 7 and "grid.png" in made and "001_house_seed6_N2_alpha2.png" in made
    image = Image.open(tmp_path / "sample" / "001_house_seed6_N2_alpha2.png")
    assert image.size == (16, 16)
    assert image.text["prompt"] == "house" and image.text["seed"] == "6" and image.text["N"] == "2"
    main.run(config(tiny, prompts="house", seeds=(6,)), str(tmp_path / "alone"))
    alone = Image.open(tmp_path / "alone" / "sample" / "000_house_seed6_N2_alpha2.png")
    assert np.abs(np.asarray(alone, int) - np.asarray(image, int)).max() <= 1


@pytest.mark.slow
def test_stage_reads_prompts_from_a_file_and_takes_other_sizes(tiny, tmp_path):
    (tmp_path / "prompts.txt").write_text("house\n\nred apple\n")
    main.run(
        config(
            tiny,
            prompts=str(tmp_path / "prompts.txt"),
            seeds=(1,),
            height=20,
            width=12,
            alpha=1.0,
            N=1,
            dynamics="flow",
        ),
        str(tmp_path),
    )
    assert Image.open(tmp_path / "sample" / "001_red-apple_seed1_N1_alpha1.png").size == (12, 20)


@pytest.mark.parametrize(
    "fields,error,words",
    [
        ({"height": 17}, ValueError, "config.height=17 is not divisible by the autoencoder's factor 2; use 16 or 18"),
        ({"prompts": "nowhere.txt"}, FileNotFoundError, "config.prompts='nowhere.txt': no such file"),
        ({"N": 0}, ValueError, "N=0"),
        (
            {"solver": "euler"},
            ValueError,
            "solver='euler' does not fit a teacher; use auto or one of dpm_solver, ddim",
        ),
        ({"dynamics": "dream"}, ValueError, "dynamics='dream' is not one of auto, flow, teacher"),
        ({"dtype": "int8"}, ValueError, "config.dtype='int8' is not one of float32, bfloat16"),
        ({"attention": "magic"}, ValueError, "attention='magic' is not one of"),
        ({"seeds": (-1,)}, ValueError, "config.seeds"),
        ({"alpha": 1.0, "negative": "a face"}, ValueError, "guidance needs alpha > 1"),
        ({"stage": "dream"}, ValueError, "config.stage='dream' is not one of"),
        ({"batch": 0}, ValueError, "config.batch=0"),
    ],
)
def test_bad_settings_end_in_one_clear_message(fields, error, words, tiny, tmp_path):
    with pytest.raises(error) as raised:
        main.run(config(tiny, **fields), str(tmp_path))
    assert words in str(raised.value)


@pytest.mark.slow
def test_a_long_prompt_is_cut_with_a_warning_that_names_the_lost_words(tiny, tmp_path):
    with pytest.warns(UserWarning, match="these words are lost: 'apple a red"):
        main.run(config(tiny, prompts="a red apple " * 12 + "and final words", seeds=(1,)), str(tmp_path))


@pytest.mark.parametrize(
    "edit,words",
    [
        (lambda index: index.update(unet=["diffusers", "UNet3DConditionModel"]), ["unet", "UNet3DConditionModel"]),
        (
            lambda index: index.update(_class_name="StableDiffusionXLPipeline"),
            ["_class_name", "StableDiffusionXLPipeline"],
        ),
        (lambda index: index.update(text_encoder_2=["transformers", "CLIPTextModel"]), ["text_encoder_2"]),
        (lambda index: index.pop("vae"), ["does not list vae"]),
    ],
)
def test_an_unknown_part_of_a_pipeline_is_refused(edit, words, copy):
    index = json.loads((copy / "model_index.json").read_text())
    edit(index)
    (copy / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError) as error:
        pipeline.load(str(copy), variant=None, attention="xla")
    assert all(word in str(error.value) for word in ["model_index.json", *words])


def test_learned_words_beyond_the_text_encoders_table_are_refused(copy):
    size = json.loads((copy / "text_encoder" / "config.json").read_text())["vocab_size"]
    known = len(Tokenizer.from_pretrained(copy).vocab)
    words = {f"<word-{i}>": i for i in range(known, size + 1)}
    (copy / "tokenizer" / "added_tokens.json").write_text(json.dumps(words))
    with pytest.raises(ValueError, match=f"has ids up to {size}, but text_encoder has vocab_size={size}; use"):
        pipeline.load(str(copy), variant=None, attention="xla")


@pytest.mark.parametrize(
    "fields,want",
    [
        ({"sample_size": 8, "_diffusers_version": "0.6.0"}, (64, 64, 4)),
        ({"sample_size": 32, "_diffusers_version": "0.8.1"}, (64, 64, 4)),
        ({"sample_size": 96, "_diffusers_version": "0.6.0"}, (96, 96, 4)),
        ({"sample_size": 8, "_diffusers_version": "0.9.0"}, (8, 8, 4)),
        ({"sample_size": 8}, (8, 8, 4)),
        ({"sample_size": [6, 10]}, (6, 10, 4)),
    ],
    ids=str,
)
def test_the_size_a_model_was_made_for_is_that_of_diffusers(fields, want, copy):
    path = copy / "unet" / "config.json"
    raw = {name: value for name, value in json.loads(path.read_text()).items() if not name.startswith("_diffusers")}
    path.write_text(json.dumps(raw | fields))
    old = pytest.warns(UserWarning, match="before 0.9 meant 64") if want[0] == 64 else contextlib.nullcontext()
    with old:
        pipe = pipeline.load(str(copy), variant=None, attention="xla")
    assert pipe.latent_shape == loading.latent_shape(pipe.nets, 0, 0) == want
    factor = pipe.nets["vae"].config.factor
    assert loading.latent_shape(pipe.nets, 4 * factor, 0) == (4, *want[1:])


def test_a_model_that_does_not_say_its_size_asks_for_height_and_width(copy):
    path = copy / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sample_size": None}))
    pipe = pipeline.load(str(copy), variant=None, attention="xla")
    for height, width in ((0, 0), (8, 0)):
        with pytest.raises(ValueError, match=r"^[^\n]*no sample_size; set config\.height and config\.width[^\n]*$"):
            loading.latent_shape(pipe.nets, height, width)
    factor = pipe.nets["vae"].config.factor
    assert loading.latent_shape(pipe.nets, 8 * factor, 16 * factor) == (8, 16, 4)


def test_folders_of_two_models_are_refused(copy):
    path = copy / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"cross_attention_dim": 24}))
    with pytest.raises(ValueError, match="misshapen"):
        pipeline.load(str(copy), variant=None, attention="xla")


@pytest.mark.slow
def test_the_command_line_reports_an_error_in_one_line_and_exits_with_1(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "instaflow_jax.main",
            "--config=configs/sample.py",
            f"--config.model={tmp_path / 'nowhere'}",
        ],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr and str(tmp_path / "nowhere") in done.stderr.strip().splitlines()[-1]


# ---------------------------------------------------------------- values that are not finite


def change(path, key, value):
    """Sets the first value of a tensor in a safetensors file."""
    tensors = safetensors.numpy.load_file(path)
    key = key if key in tensors else key.removeprefix("text_model.")  # the file of transformers 5.6 and later
    tensors[key] = tensors[key].copy()
    tensors[key].flat[0] = value
    safetensors.numpy.save_file(tensors, path)


UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
VAE_FILE = "vae/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    "path,key,value",
    [
        (UNET_FILE, "conv_in.weight", np.nan),
        (VAE_FILE, "decoder.conv_out.bias", np.inf),
        ("text_encoder/model.safetensors", "text_model.final_layer_norm.weight", -np.inf),
    ],
)
def test_a_weight_that_is_not_finite_is_named(path, key, value, copy, tmp_path):
    change(copy / path, key, value)
    with pytest.raises(ValueError, match="is NaN or infinite in 1 of its") as refused:
        main.run(config(copy), str(tmp_path / "out"))
    assert str(copy) in str(refused.value) and path in str(refused.value) and f"weight {key} " in str(refused.value)
    assert "\n" not in str(refused.value) and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_lora_that_brings_in_nan_is_named(copy, tmp_path):
    for name in ("good", "bad"):
        key = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_"
        up, down = np.ones((64, 2), np.float32), np.ones((2, 64), np.float32)
        safetensors.numpy.save_file({f"{key}A.weight": down, f"{key}B.weight": up}, tmp_path / f"{name}.safetensors")
    change(tmp_path / "bad.safetensors", f"{key}B.weight", np.nan)
    with pytest.raises(ValueError, match=r"^\S*bad\.safetensors: unet.*, weight mid_block\S*to_q\.weight is NaN"):
        main.run(config(copy, loras=f"{tmp_path}/good.safetensors|{tmp_path}/bad.safetensors"), str(tmp_path / "out"))


@pytest.mark.slow
def test_an_image_that_is_not_finite_is_named_by_prompt_and_seed(copy, tmp_path):
    """Finite weights whose product is too large for float32."""
    change(copy / VAE_FILE, "decoder.conv_in.bias", 3e38)
    with pytest.raises(ValueError, match="prompt 'red apple', seed 5 is NaN or infinite, as are 5 others of 6"):
        main.run(config(copy, batch=6), str(tmp_path))
    assert not list(tmp_path.glob("sample/*.png"))
    pipe = pipeline.load(str(copy), variant=None, attention="xla")
    served = serve_models.make_model(pipe, "tiny", dynamics="teacher", alpha=1.0, choices=(1,))
    with pytest.raises(ValueError, match="prompt 'house', seed 3 is NaN or infinite"):
        served.draw(serve_models.Settings("house", seed=3, N=1), [], lambda done: None)
    options = fit.EvalOptions(prompts=("red apple", "house"), seeds=2, N=(1,), alpha=1.0)
    evaluate = flow_training.make_evaluate(options, pipe, pipe.latent_shape)
    with pytest.raises(ValueError, match="prompt 'red apple', seed 0 is NaN or infinite, as are 3 others of 4"):
        evaluate(pipe.params["unet"], tmp_path / "grid.png")


def test_a_file_that_has_changed_since_its_checksum_is_named(copy, tmp_path):
    files.write_checksums(copy)
    change(copy / UNET_FILE, "conv_in.bias", 0.5)
    with pytest.raises(ValueError, match=r"unet/diffusion_pytorch_model\.safetensors is damaged.*or delete"):
        main.run(config(copy), str(tmp_path / "out"))
    loading.load(str(copy), loading.WeightOptions(verify=False))
