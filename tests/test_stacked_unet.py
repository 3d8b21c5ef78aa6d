"""The Stacked U-Net: against two of diffusers' U-Nets, from weights of one or two U-Nets, and in every stage."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    UNET,
    distill_config,
    drawn,
    load,
    normal,
    randomize,
    read_config,
    references,
    relative,
)
from jax import export as jax_export
from orbax import checkpoint as ocp

from instaflow_jax import main, pipeline, sampling
from instaflow_jax.infra import images
from instaflow_jax.models.stacked_unet import StackedUNet, stack_net, stack_params
from instaflow_jax.models.unet import UNet2DConditionModel
from instaflow_jax.stages import distill
from instaflow_jax.stages.common import flow_training
from instaflow_jax.stages.common.loading import WeightOptions
from instaflow_jax.stages.plan import programs, shapes
from instaflow_jax.train import warm_start

SMALL = UNET | {"block_out_channels": (16,), "layers_per_block": 1, "attention_head_dim": 2}
SMALL |= {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}


def nchw(x):
    return references().from_numpy(x.transpose(0, 3, 1, 2).copy())


def nhwc(x):
    return x.detach().numpy().transpose(0, 2, 3, 1)


# ---------------------------------------------------------------- the network


def test_parameters_at_sd15s_size():
    """2 × 859,520,964, less conv_out's 11,524 and conv_in's 11,840."""
    unet = shapes.make_nets({"unet": shapes.read_configs("sd15_stacked")["unet"]})["unet"]
    assert unet.module is StackedUNet
    assert sum(math.prod(p.shape) for p in unet.shapes.values()) == 1_719_018_564


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """Two of diffusers' U-Nets with random weights, and the same in this package: (net, params) of each."""
    references()
    from diffusers import UNet2DConditionModel as Reference

    theirs, ours = [randomize(Reference(**SMALL), seed) for seed in (0, 1)], []
    for unet in theirs:
        folder = tmp_path_factory.mktemp("unet")
        unet.save_pretrained(folder)
        ours.append(UNet2DConditionModel.from_pretrained(folder))
    return theirs, ours


def in_series(unets, x, middle_norm=True):
    """The output of two of diffusers' U-Nets without the parts between them."""
    torch, (first, second) = references(), [type(unet).from_config(unet.config) for unet in unets]
    for copy, unet in zip((first, second), unets, strict=True):
        copy.load_state_dict(unet.state_dict())
    first.conv_out, second.conv_in = torch.nn.Identity(), torch.nn.Identity()
    if not middle_norm:
        first.conv_norm_out = None
    for unet in (first, second):
        x = unet(x, torch.tensor(TAU), torch.tensor(TEXT)).sample
    return x


X, TEXT, TAU = normal(0, 2, 8, 8, 4), normal(1, 2, 7, 16), np.array([1000.0, 3.5], np.float32)


def stacked_from(ours, middle_norm):
    net = stack_net(ours[0][0], middle_norm)
    return net, stack_params(net, ours[0][1], ours[1][1])


@pytest.mark.slow
def test_it_equals_two_unets_of_diffusers_in_series(twins):
    """Output, and the gradient by the input, which passes through both halves."""
    theirs, (net, params) = twins[0], stacked_from(twins[1], True)
    x = nchw(X).requires_grad_()
    want = in_series(theirs, x)
    want.square().sum().backward()

    def square(x):
        out = net.apply(params, x, TAU, TEXT)
        return jnp.sum(out**2), out

    gradient, got = jax.jit(jax.grad(square, has_aux=True))(X)
    differences = relative(got, nhwc(want)), relative(gradient, nhwc(x.grad))
    print("relative differences from diffusers: output {:.1e}, gradient {:.1e}".format(*differences))
    assert 0.01 < np.std(got) < 10 and max(differences) < 1e-5


@pytest.mark.slow
def test_without_the_norm_between_it_equals_them_too(twins):
    theirs, (net, params) = twins[0], stacked_from(twins[1], False)
    with references().no_grad():
        want = nhwc(in_series(theirs, nchw(X), middle_norm=False))
    assert relative(jax.jit(net.apply)(params, X, TAU, TEXT), want) < 1e-5


# ---------------------------------------------------------------- its weights to start from


def other_unet(pipe, name, value):
    """The pipeline with another field in its UNet's config, and random weights."""
    net = UNet2DConditionModel.from_config(pipe.nets["unet"].raw_config | {name: value})
    return dataclasses.replace(pipe, nets=pipe.nets | {"unet": net}, params=pipe.params | {"unet": random_weights(net)})


def random_weights(net):
    return {name: weight.astype(np.float32) for name, weight in drawn(net).items()}


FIELDS = {"enabled": True, "second": "", "middle_norm": True}


def test_both_halves_start_from_one_unet(teacher):
    pipe = load(teacher)
    stacked = distill.stack(FIELDS, pipe, WeightOptions())
    assert stacked.index["unet"] == ["stacked_unet", "StackedUNet"] and stacked.latent_shape == pipe.latent_shape
    params, unet = stacked.params["unet"], pipe.params["unet"]
    gone = {f"halves.{i}.{name}.{part}" for i, name in ((0, "conv_out"), (1, "conv_in")) for part in ("kernel", "bias")}
    assert params.keys() == {f"halves.{i}.{name}" for i in (0, 1) for name in unet} - gone
    assert all(np.array_equal(weight, unet[name.split(".", 2)[2]]) for name, weight in params.items())
    assert distill.stack(FIELDS, stacked, WeightOptions()) is stacked
    assert distill.stack(FIELDS | {"enabled": False}, pipe, WeightOptions()) is pipe


def test_half_2_may_start_from_another_model(teacher, tmp_path):
    pipe = load(teacher)
    pipeline.save(other_unet(pipe, "sample_size", 4), tmp_path)
    stacked = distill.stack(FIELDS | {"second": str(tmp_path), "middle_norm": False}, pipe, WeightOptions())
    params, other = stacked.params["unet"], load(tmp_path).params["unet"]
    assert np.array_equal(params["halves.0.conv_in.kernel"], pipe.params["unet"]["conv_in.kernel"])
    assert np.array_equal(params["halves.1.conv_out.kernel"], other["conv_out.kernel"])
    assert "halves.0.conv_norm_out.scale" not in params


def test_what_does_not_fit_is_refused(teacher, tmp_path):
    pipe = load(teacher)
    stacked = distill.stack(FIELDS, pipe, WeightOptions())
    for fields in ({"second": "nowhere"}, {"middle_norm": False}):
        with pytest.raises(ValueError, match=r"is a Stacked U-Net already: use config\.stacked\.second=''"):
            distill.stack(FIELDS | fields, stacked, WeightOptions())
    pipeline.save(other_unet(pipe, "norm_eps", 1e-3), tmp_path / "other")
    with pytest.raises(ValueError, match=r"two U-Nets of one architecture: norm_eps=1e-05, not 0\.001"):
        distill.stack(FIELDS | {"second": str(tmp_path / "other")}, pipe, WeightOptions())
    pipeline.save(flow_training.as_flow(pipe, pipe.params["unet"]), tmp_path / "flow")
    with pytest.raises(ValueError, match="must both be flows, or both teachers"):
        distill.stack(FIELDS | {"second": str(tmp_path / "flow")}, pipe, WeightOptions())


def test_a_warm_start_converts_each_half(teacher):
    pipe = load(teacher)
    stacked = distill.stack(FIELDS, pipe, WeightOptions())
    schedule = sampling.read_dynamics(pipe.scheduler, pipe.index, "auto")
    alone, both = (warm_start.from_teacher(p.params["unet"], p.nets["unet"], schedule, 1000) for p in (pipe, stacked))
    for name, weight in both.items():
        np.testing.assert_array_equal(weight, alone[name.split(".", 2)[2]], err_msg=name)


# ---------------------------------------------------------------- the stages


@pytest.fixture(scope="module")
def run(only_training, teacher, tmp_path_factory):
    """A workdir with a flow and the Stacked U-Net that was distilled from it."""
    workdir, pipe = tmp_path_factory.mktemp("run"), load(teacher)
    flow_training.export(pipe, random_weights(pipe.nets["unet"]), workdir / "reflow" / "export")
    main.run(distill_config(teacher, "stacked"), str(workdir))
    return workdir


@pytest.fixture(scope="module")
def ours(run):
    """Its export, prompts' embeddings, noise, and the latents of one step."""
    pipe = load(run / "stacked" / "export")
    text = pipe.nets["text_encoder"].apply(pipe.params["text_encoder"], pipe.tokenizer(["house", "red apple"]))
    X0, text = normal(0, 2, 4, 4, 4), np.asarray(text.last_hidden_state)
    return pipe, text, X0, X0 + np.asarray(jax.jit(pipe.nets["unet"].apply)(pipe.params["unet"], X0, 1000.0, text))


@pytest.mark.slow
def test_distillation_trains_both_halves(run, ours):
    pipe, before = ours[0], load(run / "reflow" / "export").params["unet"]
    assert pipe.nets["unet"].module is StackedUNet
    for i in (0, 1):
        name = "mid_block.resnets.0.conv1.kernel"
        assert np.any(pipe.params["unet"][f"halves.{i}.{name}"] != before[name])
    rows = [json.loads(line) for line in (run / "stacked" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bits(run, teacher, tmp_path):
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    shutil.rmtree(copy / "stacked" / "checkpoints" / "4")
    shutil.rmtree(copy / "stacked" / "export")
    main.run(distill_config(teacher, "stacked"), str(copy))
    once, twice = (load(folder / "stacked" / "export").params["unet"] for folder in (run, copy))
    assert all(np.array_equal(weight, twice[name]) for name, weight in once.items())


@pytest.mark.slow
def test_its_programs_are_planned(teacher):
    """Enabled in the config, as for distillation, or in the shapes, as for sampling."""
    config = read_config("distill", "stacked").unlock()
    config.batch_size = jax.device_count()
    program = programs.trace(config, str(teacher), jax.devices())
    assert program.flops > 0 and "halves.1.conv_out.kernel" in repr(program.traced.args_info)
    programs.check(read_config("sample", "instaflow"), "sd15_stacked")


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """Every format, from a run that has only checkpoints."""
    folder = tmp_path_factory.mktemp("exported")
    shutil.copytree(run / "stacked" / "checkpoints", folder / "stacked" / "checkpoints")
    config = read_config("export", "stacked")
    config.model = str(folder / "stacked")
    main.run(config, str(folder))
    return folder / "export"


@pytest.mark.slow
def test_diffusers_runs_the_class_beside_the_weights(exported, ours, monkeypatch, tmp_path):
    torch, (_, text, X0, X1) = references(), ours
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import dynamic_modules_utils

    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path))
    pipe = StableDiffusionPipeline.from_pretrained(exported / "diffusers", trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe.unet).__name__ == "StackedUNet"
    with torch.no_grad():
        v = nhwc(pipe.unet(nchw(X0), 1000, torch.tensor(text)).sample) / -1.001  # see `conventions.as_stock`
        fields = {"num_inference_steps": 1, "guidance_scale": 1.0, "latents": nchw(X0), "output_type": "latent"}
        fields |= {"height": 8, "width": 8}  # diffusers refuses the 4 of this model, but takes the latents as they are
        latents = nhwc(pipe(["house", "red apple"], **fields).images)
    print(f"StackedUNet in diffusers {relative(v, X1 - X0):.1e}, one step of its pipeline {relative(latents, X1):.1e}")
    assert relative(v, X1 - X0) < 1e-5 and relative(latents, X1) < 1e-5
    assert "trust_remote_code=True" in (exported / "README.md").read_text()


@pytest.mark.slow
def test_the_other_formats_hold_the_same_flow(exported, ours):
    pipe, _, X0, X1 = ours
    ids = pipe.tokenizer(["house", "red apple"])
    program = jax_export.deserialize((exported / "stablehlo" / "one_step.jaxexport").read_bytes())
    made = program.call(dict(np.load(exported / "stablehlo" / "weights.npz")), ids, X0)
    decode = jax.jit(lambda Z: images.to_uint8(pipe.nets["vae"].apply(pipe.params["vae"], Z, method="decode")))
    assert np.abs(np.asarray(made, int) - np.asarray(decode(X1), int)).max() <= 1
    saved = ocp.StandardCheckpointer().restore(exported / "orbax")["unet"]
    assert all(np.array_equal(weight, saved[name]) for name, weight in pipe.params["unet"].items())
    again = load(exported / "diffusers")
    assert again.nets["unet"].module is StackedUNet
    name = "halves.1.conv_out.kernel"
    assert relative(again.params["unet"][name], -1.001 * pipe.params["unet"][name]) < 1e-6


@pytest.mark.slow
def test_the_flax_classes_have_no_stacked_unet(run, tmp_path):
    config = read_config("export")
    config.update({"model": str(run / "stacked" / "export"), "formats": ("msgpack",)})
    with pytest.raises(ValueError, match="is a Stacked U-Net, and diffusers' Flax classes"):
        main.run(config, str(tmp_path))
    assert not list(tmp_path.iterdir())
