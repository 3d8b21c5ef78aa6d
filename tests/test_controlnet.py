"""ControlNets: the networks against diffusers, files of every kind, `sample`, `serve`, and training one."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import safetensors.torch
from helpers import (
    UNET_PARTS,
    control_config,
    drawn,
    free_port,
    load,
    make_directory,
    normal,
    randomize,
    read_config,
    references,
    relative,
    rename,
    torch_names,
    unet_modules,
)
from PIL import Image

from instaflow_jax import main, sampling
from instaflow_jax.infra import images
from instaflow_jax.models import controlnet
from instaflow_jax.models.controlnet import ControlNetModel
from instaflow_jax.models.stacked_unet import stack_net, stack_params
from instaflow_jax.models.unet import UNet2DConditionModel
from instaflow_jax.stages import control as control_stage
from instaflow_jax.stages.common import control as loading_control
from instaflow_jax.stages.common import flow_training
from instaflow_jax.stages.common.loading import WeightOptions
from instaflow_jax.stages.serve import models as serve_models
from instaflow_jax.stages.serve import requests as serve_requests
from instaflow_jax.stages.serve import stage as serve_stage
from instaflow_jax.train.control import outline

SD1 = {  # SD 1.x's layout: convolutions as projections, no attention in the innermost block
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 24,
    "attention_head_dim": 2,
    "norm_num_groups": 8,
}
ONLY_UNET = {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "sample_size": 8}
ONLY_CONTROL = {"conditioning_embedding_out_channels": (8, 12, 16)}  # images four times as large as the latents
SCALES = (0.8, 0.35)


def nchw(x):
    return references().from_numpy(x.transpose(0, 3, 1, 2).copy())


def nhwc(x):
    return x.detach().numpy().transpose(0, 2, 3, 1)


X, TEXT, TAU = normal(0, 2, 8, 6, 4), normal(1, 2, 7, 24), np.array([1000.0, 3.5], np.float32)
IMAGES = [np.random.default_rng(B).random((B, 32, 24, 3), np.float32) for B in (2, 1)]  # for each sample, for both


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """diffusers' UNet and two ControlNets with random weights, none of them zero, and the same in this package."""
    references()
    import diffusers

    unet = randomize(diffusers.UNet2DConditionModel(**SD1 | ONLY_UNET))
    fields = SD1 | ONLY_CONTROL
    controls = [
        randomize(diffusers.ControlNetModel(**fields | {"controlnet_conditioning_channel_order": order}), seed)
        for seed, order in ((1, "rgb"), (2, "bgr"))
    ]
    ours = []
    for theirs, cls in ((unet, UNet2DConditionModel), *((control, ControlNetModel) for control in controls)):
        folder = tmp_path_factory.mktemp("net")
        theirs.save_pretrained(folder)
        ours.append(cls.from_pretrained(folder))
    return unet, controls, ours


def make_params(ours, scales):
    """What `controlnet.make_apply` takes: the UNet's weights, and those of the ControlNets with their images."""
    (_, unet), *controls = ours
    parts = [
        {"params": params, "condition": image, "scale": np.float32(scale)}
        for (_, params), image, scale in zip(controls, IMAGES, scales, strict=False)
    ]
    return {"unet": unet, "controls": parts}


@pytest.mark.slow
def test_residuals_and_unet_equal_diffusers(twins):
    """One ControlNet's residuals, and the UNet's output with two of them at their scales."""
    torch, (unet, controls, ours) = references(), twins
    from diffusers.models import MultiControlNetModel

    inputs, images = (nchw(X), torch.tensor(TAU), torch.tensor(TEXT)), [nchw(IMAGES[0]), nchw(IMAGES[1].repeat(2, 0))]
    with torch.no_grad():
        down, mid = controls[0](*inputs, images[0], conditioning_scale=SCALES[0], return_dict=False)
        both = MultiControlNetModel(controls)(*inputs, images, list(SCALES), return_dict=False)
        residuals = {"down_block_additional_residuals": both[0], "mid_block_additional_residual": both[1]}
        want, alone = nhwc(unet(*inputs, **residuals).sample), nhwc(unet(*inputs).sample)
    apply, first = controlnet.make_apply(ours[0][0], [net for net, _ in ours[1:]]), ours[1][0]

    @jax.jit
    def run(params):
        control = params["controls"][0]
        return apply(params, X, TAU, TEXT), first.apply(control["params"], X, TAU, TEXT, IMAGES[0], SCALES[0])

    got, (got_down, got_mid) = run(make_params(ours, SCALES))
    for residual, reference in zip((*got_down, got_mid), (*down, mid), strict=True):
        assert relative(residual, nhwc(reference)) < 1e-5
    print(f"two ControlNets {relative(got, want):.1e}; they change the output by {relative(want, alone):.2f}")
    assert relative(got, want) < 1e-5 and relative(want, alone) > 0.1


@pytest.mark.slow
def test_both_halves_of_the_stacked_unet_get_the_residuals(twins):
    """Against diffusers' UNet twice: half 2's first residual is added to the features that half 1 passes on."""
    torch, (reference, controls, ours) = references(), twins
    (unet, params), control = ours[0], ours[1]
    net = stack_net(unet, True)
    first, second = [type(reference).from_config(reference.config) for _ in range(2)]
    for half in (first, second):
        half.load_state_dict(reference.state_dict())
    first.conv_out, second.conv_in = torch.nn.Identity(), torch.nn.Identity()
    inputs = torch.tensor(TAU), torch.tensor(TEXT)
    with torch.no_grad():
        down, mid = controls[0](nchw(X), *inputs, nchw(IMAGES[0]), return_dict=False)
        want = nchw(X)
        for half in (first, second):
            residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
            want = half(want, *inputs, **residuals).sample
    stacked = [(net, stack_params(net, params, params)), control]
    got = jax.jit(controlnet.make_apply(net, [control[0]]))(make_params(stacked, (1.0,)), X, TAU, TEXT)
    assert relative(got, nhwc(want)) < 1e-5


def test_a_new_controlnet_adds_nothing_to_the_unet_it_starts_from():
    small = SD1 | {"block_out_channels": (16,), "down_block_types": ("DownBlock2D",)}
    unet = drawn(UNet2DConditionModel.from_config(small | {"up_block_types": ("UpBlock2D",)}))
    net = ControlNetModel.from_config(small | ONLY_CONTROL)
    start = controlnet.init_from_unet(net, unet, jax.random.key(1))
    assert start.keys() == net.shapes.keys()
    copied = [name for name in start if name in unet]
    assert len(copied) > 30 and all(np.allclose(start[name], unet[name]) for name in copied)
    down, mid = jax.jit(net.apply)(start, X, TAU, TEXT, IMAGES[0])
    assert not any(np.any(residual) for residual in (*down, mid))
    assert np.any(start["controlnet_cond_embedding.conv_in.kernel"])


def test_an_unsupported_controlnet_is_refused():
    for field, value in (("global_pool_conditions", True), ("controlnet_conditioning_channel_order", "hsv")):
        with pytest.raises(ValueError, match=f"{field}={value!r} is not supported; use"):
            ControlNetModel.from_config(SD1 | {field: value})


# ---------------------------------------------------------------- files


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A Stable Diffusion and two ControlNets of random weights, written by diffusers, and an image for each."""
    references()
    import diffusers

    root = tmp_path_factory.mktemp("world")
    pipe = make_directory(root / "sd", "flat")
    fields = {name: pipe.unet.config[name] for name in SHARED} | {"conditioning_embedding_out_channels": (8, 12)}
    controls = [randomize(diffusers.ControlNetModel(**fields), seed) for seed in (5, 6)]
    for name, control in zip("ab", controls, strict=True):
        control.save_pretrained(root / name)
        pixels = np.random.default_rng(ord(name)).integers(0, 255, (5, 7, 3), np.uint8).repeat(6, 0).repeat(6, 1)
        Image.fromarray(pixels).save(root / f"{name}.png")
    return SimpleNamespace(root=root, pipe=pipe, controls=controls, ours=load(root / "sd"))


SHARED = ("block_out_channels", "down_block_types", "layers_per_block", "cross_attention_dim", "norm_num_groups")
SHARED += ("attention_head_dim", "in_channels")


def original_names(control, unet):
    """The state dict with the names of the authors' code."""
    modules = unet_modules(unet.config) | {"controlnet_mid_block": "middle_block_out.0"}
    modules |= {f"controlnet_down_blocks.{i}": f"zero_convs.{i}.0" for i in range(len(control.controlnet_down_blocks))}
    layers = ("conv_in", *(f"blocks.{i}" for i in range(len(control.controlnet_cond_embedding.blocks))), "conv_out")
    modules |= {f"controlnet_cond_embedding.{name}": f"input_hint_block.{2 * i}" for i, name in enumerate(layers)}
    return rename(control.state_dict(), modules, UNET_PARTS, "control_model")


def save(state, path):
    safetensors.torch.save_file({key: tensor.clone().contiguous() for key, tensor in state.items()}, path)
    return str(path)


def controls_of(world, text):
    return loading_control.load_controls(text, world.ours, WeightOptions(attention="xla"))


def test_every_kind_of_file_gives_the_same_weights(world, tmp_path):
    """A directory, and single files with diffusers' names and with the original ones, alone or in a whole model."""
    control = world.controls[0]
    original = original_names(control, world.pipe.unet)
    bare = {key.removeprefix("control_model."): tensor for key, tensor in original.items()}
    whole = original | {"model.diffusion_model.out.2.bias": control.state_dict()["conv_in.bias"]}
    states = {"diffusers": control.state_dict(), "original": original, "bare": bare, "whole": whole}
    files = [save(state, tmp_path / f"{name}.safetensors") for name, state in states.items()]
    first, *others = controls_of(world, "|".join([f"{world.root / 'a'}=0.5", *files]))
    assert (first.scale, others[0].scale) == (0.5, 1.0) and first.net.config == others[0].net.config
    want = {key: tensor.numpy() for key, tensor in control.state_dict().items()}
    for loaded in (first, *others):
        got = torch_names(loaded.params)
        assert got.keys() == want.keys() and all(np.array_equal(got[key], want[key]) for key in want), loaded.source


def test_diffusers_reads_the_original_names_alike(world):
    """Its own converter, which knows four levels of condition channels, undoes `original_names`."""
    from diffusers import ControlNetModel as Reference
    from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint

    fields = {name: world.pipe.unet.config[name] for name in SHARED}
    control = randomize(Reference(**fields, conditioning_embedding_out_channels=(4, 8, 12, 16)))
    theirs = convert_controlnet_checkpoint(original_names(control, world.pipe.unet), fields)
    assert theirs.keys() == control.state_dict().keys()
    assert all(np.array_equal(tensor, theirs[key]) for key, tensor in control.state_dict().items())


def test_what_is_not_a_controlnet_of_this_model_is_refused_in_one_line(world, tmp_path):
    from diffusers import ControlNetModel as Reference

    fields = {name: world.pipe.unet.config[name] for name in SHARED}
    Reference(**fields | {"conditioning_embedding_out_channels": (8, 12, 16)}).save_pretrained(tmp_path / "large")
    wide = Reference(**fields | {"block_out_channels": (16, 16), "conditioning_embedding_out_channels": (8, 12)})
    wide.save_pretrained(tmp_path / "wide")
    lora, single = {"lora_unet_mid.alpha": wide.conv_in.bias}, tmp_path / "wide.safetensors"
    save(wide.state_dict(), single)
    for source, words in (
        (world.root / "sd" / "unet", "describes UNet2DConditionModel, not ControlNetModel"),
        (save(lora, tmp_path / "lora.safetensors"), "is not a ControlNet: it has no weights named"),
        (tmp_path / "none.safetensors", "there is no weight file"),
        (tmp_path / "wide", r"block_out_channels=\(16, 16\), but the U-Net has \(8, 16\); use"),
        (single, "has 16 channels in its first block, but the U-Net has 8; use"),
        (tmp_path / "large", "images 4 times as large as the latents, but the autoencoder makes images 2 times"),
        (f"{world.root / 'a'}=much", "config.controls=.*the scale 'much' of"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=words) as refused:
            controls_of(world, str(source))
        assert str(source).partition("=")[0] in str(refused.value) and "\n" not in str(refused.value)


# ---------------------------------------------------------------- the stage `sample`


def sample_config(world, **fields):
    config = read_config("sample")
    config.update({"model": str(world.root / "sd"), "prompts": "red apple|house", "seeds": (5,), "batch": 1})
    config.update({"controls": f"{world.root / 'a'}=0.8|{world.root / 'b'}=0.35", "attention": "xla"})
    config.conditions = f"{world.root / 'a.png'}|{world.root / 'b.png'}"
    config.update(fields)
    return config


def images_of(world, workdir, **fields):
    main.run(sample_config(world, **fields), str(workdir))
    files = sorted((workdir / "sample").glob("0*.png"))
    return np.stack([images.load_png(file)[0] for file in files]).astype(int), images.load_png(files[0])[1]


@pytest.mark.slow
def test_a_guided_teacher_equals_diffusers_pipeline(world, tmp_path):
    """Two ControlNets on both halves of the guided batch, images resized as diffusers resizes them."""
    import diffusers

    parts = {name: getattr(world.pipe, name) for name in ("vae", "text_encoder", "tokenizer", "unet")}
    pipe = diffusers.StableDiffusionControlNetPipeline(
        **parts,
        controlnet=world.controls,
        scheduler=diffusers.DPMSolverMultistepScheduler.from_pretrained(world.root / "sd" / "scheduler"),
        **dict.fromkeys(("safety_checker", "feature_extractor")),
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    noise = np.asarray(sampling.noise(np.array([5, 5]), world.ours.latent_shape))
    want = pipe(
        ["red apple", "house"],
        image=[Image.open(world.root / f"{name}.png") for name in "ab"],
        num_inference_steps=3,
        guidance_scale=3.0,
        controlnet_conditioning_scale=[0.8, 0.35],
        latents=nchw(noise),
        height=16,
        width=16,
        output_type="np",
    ).images
    got, text = images_of(world, tmp_path, N=3, alpha=3.0)
    assert np.abs(got - np.round(want * 255)).max() <= 1
    assert "a=0.8|" in text["controls"] and text["conditions"].endswith("b.png")


@pytest.mark.slow
def test_a_one_step_flow_is_steered_at_timestep_1000(world):
    """As `serve` draws it, beside diffusers' networks at that timestep."""
    torch, pipe, ours = references(), world.pipe, world.ours
    noise = np.asarray(sampling.noise(np.array([5]), ours.latent_shape))
    text = ours.nets["text_encoder"].apply(ours.params["text_encoder"], ours.tokenizer(["house"])).last_hidden_state
    inputs = nchw(noise), 1000.0, torch.tensor(np.asarray(text))
    image = Image.open(world.root / "a.png").resize((16, 16), Image.Resampling.LANCZOS)
    with torch.no_grad():
        condition = nchw(np.asarray(image, np.float32)[None] / 255)
        down, mid = world.controls[0](*inputs, condition, conditioning_scale=0.8, return_dict=False)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        X1 = nchw(noise) + pipe.unet(*inputs, **residuals).sample
        want = pipe.vae.decode(X1 / pipe.vae.config.scaling_factor).sample
    controls = controls_of(world, f"{world.root / 'a'}=0.8")
    model = serve_models.make_model(ours, "", dynamics="flow", alpha=1.0, choices=(1,), controls=controls)
    house = serve_models.Settings("house", seed=5, N=1)
    got = model.draw(house, [images.load_rgb(world.root / "a.png")], lambda done: None)
    assert np.abs(got.astype(int) - images.to_uint8(nhwc(want))[0]).max() <= 1


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"conditions": ""}, "config.conditions='' names 0 images, but config.controls names 2 ControlNets; write one"),
        ({"controls": ""}, "names 2 images, but config.controls names 0 ControlNets"),
        ({"conditions": "none.png|none.png"}, "there is no image none.png"),
        ({"conditions": f"{__file__}|{__file__}"}, "test_controlnet.py is not readable as an image"),
    ],
)
def test_wrong_conditions_end_in_one_line_before_anything_is_compiled(fields, words, world, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=words) as refused:
        main.run(sample_config(world, **fields), str(tmp_path / "out"))
    assert "\n" not in str(refused.value) and not (tmp_path / "out").exists()


# ---------------------------------------------------------------- the stage `serve`


@pytest.mark.slow
def test_the_page_takes_an_image_for_each_controlnet(world):
    """Through gradio's client: the model gets both images, and one that is missing or is not an image is refused."""
    pytest.importorskip("gradio")
    from gradio_client import Client, handle_file
    from gradio_client.exceptions import AppError

    from instaflow_jax.stages.serve.page import layout, server

    def draw(settings, files, report):
        return np.stack([file[0, 0] for file in files])[None].repeat(2, 0)

    model = serve_models.Model("", (1,), 5, lambda prompt: len(prompt.split()), draw)
    limits = {"max_chars": 9, "max_images": 1, "controls": ("edges", "depth")}
    respond = serve_requests.make_respond([model], **limits)
    page = layout.make_page([model], respond, notice="", examples=("a",), **limits)
    try:
        url = server.open_page(page, host="127.0.0.1", port=free_port(), queue=1, uploads=True)
        client = Client(url, verbose=False, analytics_enabled=False)
        files = [handle_file(world.root / f"{name}.png") for name in "ab"]
        gallery = client.predict("cat", 3, 1, 1, *files, api_name="/draw")[1]["value"]
        shown = images.load_png(gallery[0]["image"])[0]
        want = [images.load_rgb(world.root / f"{name}.png")[0, 0] for name in "ab"]
        np.testing.assert_array_equal(shown[0], want)
        with pytest.raises(AppError, match=r"the image for depth is missing; choose a file"):
            client.predict("cat", 3, 1, 1, files[0], None, api_name="/draw")
        with pytest.raises(AppError, match="Invalid file type"):
            client.predict("cat", 3, 1, 1, files[0], handle_file(__file__), api_name="/draw")
    finally:
        page.close()


@pytest.mark.slow
def test_serve_refuses_a_controlnet_that_does_not_fit(world):
    config = read_config("serve")
    config.update({"model": str(world.root / "sd"), "dynamics": "flow", "N": (1,), "port": free_port()})
    config.controls = str(world.root / "a")
    with pytest.raises(ValueError, match=r"a: this ControlNet has in_channels=4, but the U-Net has 8; use"):
        serve_stage.load_models(config, "nowhere")  # it fits the model, but not the embedded teacher beside it
    config.teacher = ""
    ((_, options),) = serve_stage.load_models(config, "nowhere")[0]
    assert [control.source for control in options["controls"]] == [config.controls]


# ---------------------------------------------------------------- the stage `control`


def test_an_outline_is_where_colours_change():
    pixels = np.full((1, 6, 6, 3), -1.0, np.float32)
    assert not np.any(outline(pixels, 0.25))
    pixels[:, :, 3:, 1] = 1.0  # one channel of the right half
    lines = np.asarray(outline(pixels, 0.25))
    assert lines.shape == pixels.shape and np.array_equal(np.unique(lines), [0, 1])
    np.testing.assert_array_equal(lines[0, :, :, 0], np.tile([0, 0, 1, 1, 0, 0], (6, 1)))


@pytest.fixture(scope="module")
def run(teacher, fast_compilation, tmp_path_factory):
    """A workdir with a flow, pairs, and the ControlNet that was trained with them."""
    workdir, pipe = tmp_path_factory.mktemp("run"), load(teacher)
    flow_training.export(pipe, drawn(pipe.nets["unet"]), workdir / "reflow" / "export")
    main.run(control_config(teacher), str(workdir))
    return workdir


@pytest.mark.slow
def test_a_trained_controlnet_fits_the_flow_and_follows_its_config(run, teacher):
    folder = run / "control"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    assert (folder / "grids" / "0000004.png").is_file() and any("outline_error_N1" in row for row in rows)
    config = read_config("sample")
    config.update({"model": str(run / "reflow" / "export"), "controls": str(folder / "export"), "check": True})
    config.conditions = str(folder / "outlines" / "red-apple.png")
    main.run(config, str(run))
    net, params = ControlNetModel.from_pretrained(folder / "export")
    before = load(run / "reflow" / "export").params["unet"]
    assert net.config.conditioning_embedding_out_channels == (8,)
    assert np.any(params["controlnet_mid_block.kernel"]) and np.any(
        params["conv_in.kernel"] != before["conv_in.kernel"]
    )


def test_its_config_has_no_field_that_only_training_of_a_flow_reads():
    config = read_config("control")
    assert not {"lora", "warm_start"} & set(config) and {"lora", "warm_start"} <= set(config.reflow)


def test_a_controlnet_is_trained_for_a_flow_and_its_autoencoder(teacher, tmp_path):
    config = control_config(teacher)
    config.model = str(teacher)
    with pytest.raises(ValueError, match="a ControlNet is trained for a flow with one U-Net: use"):
        control_stage.check(config, str(tmp_path))
    config = control_config(teacher)
    config.channels = (8, 8)
    with pytest.raises(ValueError, match=r"config.channels=\(8, 8\) makes images 2 times .* them 1 times .*use 1 numb"):
        control_stage.check(config, str(tmp_path))
    assert not list(tmp_path.iterdir())
