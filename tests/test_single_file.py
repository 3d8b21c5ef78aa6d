"""Export in the original naming: read back to the bit, by diffusers, and drawn by ComfyUI's formulas."""

import dataclasses
import functools
import itertools
import json
import types

import jax
import numpy as np
import pytest
import safetensors.numpy
from helpers import load, make_directory, normal, read_config, relative, to_ldm, torch_names

from instaflow_jax import main, pipeline, sampling
from instaflow_jax.models.stacked_unet import StackedUNet
from instaflow_jax.stages.common.loading import WeightOptions
from instaflow_jax.stages.export import card, single_file
from instaflow_jax.stages.export import source as export_source
from instaflow_jax.stages.export.formats import Options
from instaflow_jax.weights import ldm, port

X0 = normal(0, 2, 8, 8, 4)
PROMPTS = ["red apple", "house"]
DEAD = {"betas", "alphas_cumprod", "model_ema.decay", "model_ema.diffusion_modelinput_blocks00weight"}
DEAD |= {"cond_stage_model.transformer.text_model.embeddings.position_ids"}
DEAD |= {"cond_stage_model.model.text_projection", "cond_stage_model.model.logit_scale"}


def export(model, workdir, **fields):
    config = read_config("export")
    config.update({"model": str(model), "formats": ("single_file",), "dynamics": "flow", "prompts": "red apple"})
    config.update(fields)
    main.run(config, str(workdir))
    return workdir / "export"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A flow with SD's layout in diffusers' directory, and its export; each made once."""

    @functools.cache
    def make(kind, dtype="float32"):
        folder = tmp_path_factory.mktemp(kind)
        pipe = make_directory(folder / "base", kind)
        formats = ("single_file", "diffusers")
        exported = export(folder / "base", folder, single_file_dtype=dtype, formats=formats)
        file = exported / "single_file" / single_file.CHECKPOINT
        ours = load(folder / "base")
        encoder, ids = ours.nets["text_encoder"], ours.tokenizer(PROMPTS)
        return types.SimpleNamespace(
            pipe=pipe,
            ours=ours,
            base=folder / "base",
            export=exported,
            file=file,
            velocity=jax.jit(ours.nets["unet"].apply),
            text=np.asarray(encoder.apply(ours.params["text_encoder"], ids).last_hidden_state),
        )

    return make


@pytest.fixture
def sd1(models):
    return models("sd1")


def released_loop(model, N):
    """Latents after N steps Z += v(Z, 1000·(1 − i/N)) / N."""
    Z = X0
    for i in range(N):
        v = model.velocity(model.ours.params["unet"], Z, np.float32(1000 * (1 - i / N)), model.text)
        Z = Z + np.asarray(v) / N
    return Z


# ---------------------------------------------------------------- the file


@pytest.mark.slow
@pytest.mark.parametrize("kind,dtype", [("sd1", "float32"), ("sd1", "float16"), ("sd2", "float32")])
def test_the_file_is_compvis_own_with_the_sign_of_the_velocity_changed(kind, dtype, models, torch):
    """Against a state dict that the tests write by walking through CompVis' constructors."""
    model = models(kind, dtype)
    stored = safetensors.numpy.load_file(model.file)
    want = {key: tensor.numpy() for key, tensor in to_ldm(model.pipe, kind).items() if key not in DEAD}
    assert stored.keys() == want.keys()
    for key, value in want.items():
        sign = -1 if key.startswith("model.diffusion_model.out.2.") else 1
        assert stored[key].dtype == np.dtype(dtype)
        np.testing.assert_array_equal(stored[key], (sign * value).astype(dtype), err_msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("kind,dtype", [("sd1", "float32"), ("sd1", "float16"), ("sd2", "float32")])
def test_the_file_read_back_is_the_flow(kind, dtype, models):
    """Over the directory of a teacher: the file itself says that it is a flow."""
    model = models(kind, dtype)
    again = load(model.file, base=str(model.base))
    assert sampling.read_dynamics(again.scheduler, again.index, "auto") == sampling.Flow(-1, 1000)
    for net, params in model.ours.params.items():
        for name, value in params.items():
            sign = -1 if net == "unet" and name.startswith("conv_out.") else 1
            want = (sign * value).astype(dtype).astype(np.float32)
            np.testing.assert_array_equal(again.params[net][name], want, err_msg=name)


def test_an_export_of_the_file_is_the_flow_it_came_from(sd1):
    options = WeightOptions(base=str(sd1.base), attention="xla")
    source = export_source.load(str(sd1.file), "ema", "auto", options)
    assert source.dynamics == sampling.Flow(1, 1000)
    for name, value in sd1.ours.params["unet"].items():
        np.testing.assert_array_equal(source.pipe.params["unet"][name], value, err_msg=name)


def test_the_header_says_what_the_file_is(sd1):
    metadata = port.read_metadata(sd1.file)
    for key in ("sai_model_spec", "architecture", "implementation", "title"):  # those that ModelSpec requires
        assert metadata[f"modelspec.{key}"]
    stated = {key.removeprefix("modelspec."): value for key, value in metadata.items()}
    assert stated["prediction_type"] == "flow" and stated["timestep_range"] == "1000,1000"
    assert "one step" in stated["description"] and "ModelSamplingSD3" in stated["usage_hint"]
    assert stated["resolution"] == "32x32" and stated["license"] == "other"
    assert not {"v_pred", "ztsnr"} & port.open_weights(sd1.file).keys()  # ComfyUI's marks of v-prediction


@pytest.mark.parametrize(
    "widths,context,linear,name",
    [
        ((320, 640, 1280, 1280), 768, False, "stable-diffusion-v1-rectified-flow"),
        ((320, 640, 1280, 1280), 1024, True, "stable-diffusion-v2-rectified-flow"),
        ((320, 640, 1280, 1280), 768, True, "latent-diffusion-rectified-flow"),
        ((32, 64, 128, 128), 768, False, "latent-diffusion-rectified-flow"),
    ],
)
def test_the_architecture_is_stated_only_where_the_layout_is_stable_diffusions(widths, context, linear, name, sd1):
    unet = dataclasses.replace(
        sd1.ours.nets["unet"].config,
        block_out_channels=widths,
        down_block_types=("DownBlock2D",) * 4,
        up_block_types=("UpBlock2D",) * 4,
        cross_attention_dim=context,
        use_linear_projection=linear,
    )
    nets = sd1.ours.nets | {"unet": dataclasses.replace(sd1.ours.nets["unet"], config=unet)}
    pipe = dataclasses.replace(sd1.ours, nets=nets)
    source = export_source.Source("x", pipe, sampling.Flow(1, 1000), {}, None)
    assert single_file.metadata(source, "other")["modelspec.architecture"] == name
    text = card.use_single_file(source, Options(("single_file",), "stock", "", "float32"))
    assert ("ComfyUI and the web UIs do not load it" in text) == name.startswith("latent")
    assert ("steps 1, cfg 1.0" in text) == name.startswith("stable")


# ---------------------------------------------------------------- other programs


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_diffusers_reads_the_file_and_takes_our_step(kind, models, torch, monkeypatch):
    """With the lines of the card."""
    model = models(kind)
    want = released_loop(model, 1)
    text = (model.export / "README.md").read_text()
    lines = text.split("`single_file/`:")[1].split("```python\n")[1].split("```")[0].strip().splitlines()
    assert lines.pop().startswith('pipe("red apple", num_inference_steps=1, guidance_scale=1.0)')
    monkeypatch.chdir(model.export)
    names = {}
    exec("\n".join(lines), names)
    latents = torch.tensor(X0.transpose(0, 3, 1, 2))
    names["pipe"].set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 1, "guidance_scale": 1.0, "latents": latents, "output_type": "latent"}
    got = names["pipe"](PROMPTS, **options).images.numpy().transpose(0, 2, 3, 1)
    print(f"from_single_file, {kind}: relative difference of latents {relative(got, want):.1e}")
    assert relative(got, want) < 1e-5


class ModelSamplingSD3:
    """ComfyUI's node: sigmas of ModelSamplingDiscreteFlow, input and output of CONST."""

    def __init__(self, shift):
        t = np.arange(1, 1001, dtype=np.float32) / 1000
        self.sigmas = shift * t / (1 + (shift - 1) * t)

    def scale_noise(self, sigma, noise):  # and an empty latent image
        return sigma * noise

    def denoise(self, unet, x, sigma):
        return x - sigma * unet(x, 1000 * sigma)


class ModelSamplingEps:
    """What ComfyUI and AUTOMATIC1111's web UI do with a checkpoint of SD 1.x by default."""

    def __init__(self):
        abar = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
        self.sigmas = np.float32(np.sqrt((1 - abar) / abar))

    def scale_noise(self, sigma, noise):
        return noise * np.sqrt(1 + sigma**2)

    def denoise(self, unet, x, sigma):
        timestep = np.abs(np.log(self.sigmas) - np.log(sigma)).argmin()
        return x - sigma * unet(x / np.sqrt(1 + sigma**2), np.float32(timestep))


def ksampler(unet, noise, model, steps, sampler_name, scheduler, cfg, denoise):
    """ComfyUI's KSampler for these settings: `simple_scheduler`, `sample_euler`; cfg 1 runs the prompt alone."""
    assert (sampler_name, scheduler, cfg, denoise) == ("euler", "simple", 1.0, 1.0)
    sigmas = [model.sigmas[-(1 + int(i * len(model.sigmas) / steps))] for i in range(steps)] + [np.float32(0)]
    x = model.scale_noise(sigmas[0], noise)
    for sigma, after in itertools.pairwise(sigmas):
        x = x + (after - sigma) * (x - model.denoise(unet, x, sigma)) / sigma
    return x


def run_graph(path, unet, noise):
    """Follows the graph's connections back from the decoder to the latents."""
    graph = json.loads(path.read_text())
    (decoder,) = [node for node in graph.values() if node["class_type"] == "VAEDecode"]
    sampler = graph[decoder["inputs"]["samples"][0]]
    settings = dict(sampler["inputs"])
    model = graph[settings.pop("model")[0]]
    assert (sampler["class_type"], model["class_type"]) == ("KSampler", "ModelSamplingSD3")
    for name, kind in (("positive", "CLIPTextEncode"), ("negative", "CLIPTextEncode"), ("latent_image", "EmptyLatent")):
        assert graph[settings.pop(name)[0]]["class_type"].startswith(kind)
    loader = graph[model["inputs"]["model"][0]]
    assert loader == {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": single_file.CHECKPOINT}}
    settings.pop("seed")
    return ksampler(unet, noise, ModelSamplingSD3(model["inputs"]["shift"]), **settings), settings


@pytest.fixture(scope="module")
def comfyui(models, torch):
    """The file's UNet as PyTorch runs it: `unet(x, timestep)`, NHWC, with the prompts' embeddings."""
    from diffusers import UNet2DConditionModel as TorchUNet

    model = models("sd1")
    net = TorchUNet.from_single_file(str(model.file), config=str(model.base), subfolder="unet", local_files_only=True)

    def unet(x, timestep):
        with torch.no_grad():
            x, timestep = torch.tensor(np.float32(x).transpose(0, 3, 1, 2)), torch.tensor(timestep)
            return net(x, timestep, torch.tensor(model.text)).sample.numpy().transpose(0, 2, 3, 1)

    return model, unet


@pytest.mark.slow
def test_the_graph_draws_our_step_by_comfyuis_formulas(comfyui):
    model, unet = comfyui
    want = released_loop(model, 1)
    got, settings = run_graph(model.export / "single_file" / single_file.GRAPH, unet, X0)
    assert settings["steps"] == 1
    print(f"ComfyUI's formulas: relative difference of latents {relative(got, want):.1e}")
    assert relative(got, want) < 1e-5
    without, step = ksampler(unet, X0, ModelSamplingEps(), **settings), want - X0
    assert relative(without - X0, step) > 0.5  # a graph without the node draws something else


@pytest.mark.slow
def test_comfyuis_steps_are_eulers(comfyui):
    """Two of them, as the card of a progressively distilled flow asks for."""
    model, unet = comfyui
    got = ksampler(unet, X0, ModelSamplingSD3(1.0), 2, "euler", "simple", 1.0, 1.0)
    assert relative(got, released_loop(model, 2)) < 1e-5


def test_the_graph_of_a_flow_of_several_steps_takes_as_many(sd1, monkeypatch):
    monkeypatch.setattr(single_file, "family", lambda source: "stable-diffusion-v1")
    run = {"stage": "progressive", "N": 4}
    source = export_source.Source("a/progressive_4", sd1.ours, sampling.Flow(1, 1000), run, 1)
    graph = single_file.comfyui_graph(source, "a fox")
    assert [node["inputs"]["steps"] for node in graph.values() if "steps" in node["inputs"]] == [4]
    assert "a fox" in [node["inputs"].get("text") for node in graph.values()]
    assert "timestep_range" not in {key.removeprefix("modelspec.") for key in single_file.metadata(source, "other")}
    assert "steps 4, cfg 1.0" in card.use_single_file(source, Options(("single_file",), "stock", "", "float32"))


# ---------------------------------------------------------------- teachers, refusals


V = {"prediction_type": "v_prediction"}


@pytest.mark.parametrize("fields", [{}, V, V | {"rescale_betas_zero_snr": True}])
def test_a_teacher_says_what_it_predicts(fields, sd1, tmp_path):
    scheduler = sd1.ours.scheduler | {"_class_name": "DDIMScheduler"} | fields
    pipe = dataclasses.replace(sd1.ours, scheduler=scheduler)
    source = export_source.Source("x", pipe, sampling.read_dynamics(scheduler, pipe.index, "auto"), {}, None)
    single_file.write(source, tmp_path / "out", dtype="float32", licence="other", prompts="red apple")
    file = tmp_path / "out" / single_file.CHECKPOINT
    assert [path.name for path in file.parent.iterdir()] == [file.name]  # no graph
    assert ldm.prediction_fields(file) == {"prediction_type": "epsilon"} | fields
    stored = port.open_weights(file)
    np.testing.assert_array_equal(
        stored["model.diffusion_model.out.2.weight"](), torch_names(pipe.params["unet"])["conv_out.weight"]
    )


def test_what_has_no_place_in_the_file_is_refused_before_anything_is_written(sd1, tmp_path):
    pipe = sd1.ours
    source = export_source.Source("here", pipe, sampling.Flow(1, 1000), {}, None)
    unet = dataclasses.replace(pipe.nets["unet"], module=StackedUNet)
    stacked = dataclasses.replace(source, pipe=dataclasses.replace(pipe, nets=pipe.nets | {"unet": unet}))
    with pytest.raises(ValueError, match=r"here is a Stacked U-Net.*leave 'single_file' out of config\.formats"):
        single_file.check(stacked, "float16")
    with pytest.raises(ValueError, match="this flow has num_timesteps=500; leave 'single_file' out"):
        single_file.check(dataclasses.replace(source, dynamics=sampling.Flow(1, 500)), "float16")
    unet = pipe.params["unet"] | {"conv_in.bias": pipe.params["unet"]["conv_in.bias"] + 1e5}
    pipeline.save(dataclasses.replace(pipe, params=pipe.params | {"unet": unet}), tmp_path / "large")
    words = r"weight unet/conv_in\.bias has values up to .*float16 ends at 65504; use .*single_file_dtype='float32'"
    with pytest.raises(ValueError, match=words):
        export(tmp_path / "large", tmp_path)
    with pytest.raises(ValueError, match=r"config\.single_file_dtype='int8' is not one of float16, float32"):
        export(tmp_path / "large", tmp_path, single_file_dtype="int8")
    assert [path.name for path in tmp_path.iterdir()] == ["large"]
