"""Published directories and single files: the released layout, the original LDM naming of SD 1.x and 2.x."""

import collections
import copy
import functools
import json
import re
import shutil
import sys
import types

import jax
import numpy as np
import pytest
import safetensors.torch
from helpers import assert_is, load, make_directory, normal, references, relative, state_of, to_ldm

from instaflow_jax import pipeline, sampling, solvers, teacher
from instaflow_jax.weights import ldm, lora, torch_file
from instaflow_jax.weights.delta import Delta


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """For each kind a directory, and a single file in the original naming with the same weights."""

    @functools.cache
    def make(kind):
        folder = tmp_path_factory.mktemp(kind)
        pipe = make_directory(folder / "base", kind)
        state = to_ldm(pipe, kind)
        safetensors.torch.save_file(state, folder / "model.safetensors")
        return types.SimpleNamespace(
            kind=kind,
            base=str(folder / "base"),
            state=state,
            pipe=pipe,
            ours=load(folder / "base"),
            file=str(folder / "model.safetensors"),
        )

    return make


@pytest.fixture(params=["sd1", "sd2"])
def model(request, models):
    return models(request.param)


@pytest.fixture
def sd1(models):
    return models("sd1")


def read(path, pipe):
    """The weights of a single file for the networks of `pipe`."""
    configs, shapes = ({name: getattr(net, field) for name, net in pipe.nets.items()} for field in ("config", "shapes"))
    return ldm.read(path, configs, shapes)


# ---------------------------------------------------------------- single files


def test_a_single_file_gives_diffusers_weights_to_the_bit(model):
    from diffusers import StableDiffusionPipeline

    theirs = StableDiffusionPipeline.from_single_file(model.file, config=model.base, local_files_only=True)
    ours = load(model.file, base=model.base)
    assert_is(ours.params, theirs)
    assert_is(ours.params, model.pipe)
    same = model.ours
    assert (ours.scheduler, ours.index, ours.tokenizer.vocab) == (same.scheduler, same.index, same.tokenizer.vocab)


def test_names_map_one_to_one(model):
    """Each weight has one place, and the places are exactly the file's keys."""
    nets = model.ours.nets
    tables = {name: ldm.places(name, net.config, net.shapes, model.kind == "sd2") for name, net in nets.items()}
    places = [place for table in tables.values() for place in table.values()]
    assert len(set(places)) == len(places) == sum(len(net.shapes) for net in nets.values())
    extra = {
        "betas",
        "alphas_cumprod",
        "model_ema.decay",
        "model_ema.diffusion_modelinput_blocks00weight",
        "cond_stage_model.transformer.text_model.embeddings.position_ids",
        "cond_stage_model.model.text_projection",
        "cond_stage_model.model.logit_scale",
    }
    assert {key for key, _ in places} == model.state.keys() - extra


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "stream"])
def test_a_lightning_checkpoint_is_read_without_lightning(legacy, sd1, torch, tmp_path, monkeypatch):
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    monkeypatch.setitem(sys.modules, "pytorch_lightning", types.ModuleType("pytorch_lightning"))
    monkeypatch.setitem(sys.modules, "pytorch_lightning.callbacks", types.ModuleType("pytorch_lightning.callbacks"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    callback = module.ModelCheckpoint()
    callback.best = {"score": np.float64(0.5)}
    torch.save(
        {
            "epoch": 3,
            "state_dict": sd1.state | {"note": "text"},
            "callbacks": {module.ModelCheckpoint: callback},
            "optimizer_states": [{"state": collections.defaultdict(dict, {0: {"exp_avg": torch.ones(4)}})}],
            "seen": {1, 2},
        },
        tmp_path / "model.ckpt",
        _use_new_zipfile_serialization=not legacy,
    )
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
        monkeypatch.delitem(sys.modules, name)
    assert_is(read(tmp_path / "model.ckpt", sd1.ours), sd1.pipe)
    assert "pytorch_lightning" not in sys.modules


def test_a_checkpoint_that_asks_for_code_is_refused(torch, tmp_path):
    class Trap:
        def __reduce__(self):
            return exec, ("raise SystemExit",)

    torch.save({"state_dict": {"a": torch.ones(1)}, "callbacks": Trap()}, tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match=r"asks to run (builtins|__builtin__)\.exec"):
        torch_file.read(tmp_path / "model.ckpt")


def test_half_precision_a_bare_text_model_and_an_extra_last_block_are_read(model, torch, tmp_path):
    """Many published files are float16; SD 2.x files contain the text block that Stable Diffusion does not use."""
    state = {key.replace("transformer.text_model.", "transformer."): t.half() for key, t in model.state.items()}
    state |= {key.replace("resblocks.1.", "resblocks.2."): t + 1 for key, t in state.items() if "resblocks.1." in key}
    safetensors.torch.save_file(state, tmp_path / "half.safetensors")
    half = read(tmp_path / "half.safetensors", model.ours)
    for name, params in model.ours.params.items():
        for key, value in params.items():
            assert half[name][key].dtype == np.float32
            np.testing.assert_array_equal(half[name][key], value.astype(np.float16).astype(np.float32), err_msg=key)


def test_missing_extra_and_misshapen_weights_are_named_as_the_file_names_them(sd1, torch, tmp_path):
    state = dict(sd1.state)
    state["model.diffusion_model.input_blocks.9.0.op.weight"] = state.pop("model.diffusion_model.out.2.weight")
    safetensors.torch.save_file(state, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError) as error:
        read(tmp_path / "bad.safetensors", sd1.ours)
    for words in (
        "bad.safetensors",
        "1 missing: model.diffusion_model.out.2.weight",
        "1 extra: model.diffusion_model.input_blocks.9.0.op.weight",
    ):
        assert words in str(error.value)
    state = sd1.state | {"first_stage_model.quant_conv.bias": torch.zeros(3)}
    safetensors.torch.save_file(state, tmp_path / "bad.safetensors")
    with pytest.raises(
        ValueError, match=r"\(vae\).*(\n.*)*quant_conv.bias has shape \(3,\), the config asks for \(8,\)"
    ):
        read(tmp_path / "bad.safetensors", sd1.ours)


def test_a_single_file_needs_a_base_with_configs(sd1, torch, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no configs and no tokenizer; use base=DIR.*someone/absent"):
        load(sd1.file, base="someone/absent")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nowhere\.ckpt"):
        load(tmp_path / "nowhere.ckpt", base=sd1.base)
    safetensors.torch.save_file({"lora_unet_mid.alpha": torch.ones(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=r"not a checkpoint of the original .*; it contains lora_unet_mid\.alpha$"):
        read(tmp_path / "lora.safetensors", sd1.ours)


def save(state, path, **metadata):
    safetensors.torch.save_file({k: v.clone().contiguous() for k, v in state.items()}, path, metadata=metadata or None)
    return str(path)


@pytest.mark.parametrize("form", ["markers", "metadata", "ckpt"])
def test_a_file_that_says_it_predicts_v_is_loaded_so(form, sd1, torch, tmp_path):
    """Over a base that predicts epsilon. The schedule is diffusers', zero terminal SNR included."""
    from diffusers import DDIMScheduler

    path = tmp_path / ("model.ckpt" if form == "ckpt" else "model.safetensors")
    markers = {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}
    if form == "metadata":
        save(sd1.state, path, **{"modelspec.prediction_type": "v"})
    elif form == "markers":
        save(sd1.state | markers, path)
    else:
        torch.save({"state_dict": sd1.state | markers}, path)
    with pytest.warns(UserWarning, match="asks for prediction_type=v_prediction"):
        pipe = load(path, base=sd1.base)
    assert_is(pipe.params, sd1.pipe)
    ours, theirs = teacher.read_schedule(pipe.scheduler), DDIMScheduler.from_config(pipe.scheduler)
    assert ours.prediction_type == theirs.config.prediction_type == "v_prediction"
    assert (ours.abar[-1] == 0) == (form != "metadata")
    np.testing.assert_allclose(ours.abar, theirs.alphas_cumprod, atol=1e-6)
    theirs.set_timesteps(4)
    np.testing.assert_array_equal(solvers.ddim(ours, 4).tau, theirs.timesteps)
    assert pipe.index["scheduler"] == ["diffusers", "DDIMScheduler"] and not theirs.config.clip_sample


def test_a_v_prediction_file_over_a_flow_or_beside_an_epsilon_origin_is_refused(sd1, torch, tmp_path):
    file = save(sd1.state | {"v_pred": torch.tensor([])}, tmp_path / "v.safetensors")
    base = tmp_path / "base"
    shutil.copytree(sd1.base, base)
    index = json.loads((base / "model_index.json").read_text()) | {"_class_name": "RectifiedFlowPipeline"}
    (base / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="asks for prediction_type=v_prediction, but its base is a flow; use the base"):
        load(file, base=str(base))
    for origin in (sd1.base, sd1.file):
        with pytest.raises(ValueError, match=r"custom=.*v_prediction, but origin=.* has epsilon; use two models"):
            load(sd1.base, base=sd1.base, delta=Delta(file, origin, 1.0))


def test_diffusers_names_in_the_attention_of_the_autoencoder_are_read(sd1, torch, tmp_path):
    """Converters of diffusers' newer names leave linear layers [out, in] called to_q … in place of convolutions."""
    new = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0", "norm": "group_norm"}
    state = {}
    for key, tensor in sd1.state.items():
        if ".attn_1." in key:
            *stem, layer, word = key.split(".")
            key, tensor = ".".join([*stem, new[layer], word]), tensor.reshape(tensor.shape[:2])
        state[key] = tensor
    assert sum("attn_1.to_out.0" in key for key in state) == 4
    file = save(state, tmp_path / "model.safetensors")
    assert_is(load(file, base=sd1.base).params, sd1.pipe)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2"])
def test_single_files_and_loras_in_float8_are_read_exactly(kind, sd1, torch, tmp_path):
    state = {k: t.to(getattr(torch, kind)) if t.is_floating_point() else t for k, t in sd1.state.items()}
    small, exact = load(save(state, tmp_path / "8.safetensors"), base=sd1.base), tmp_path / "32.safetensors"
    want = load(save({k: t.float() for k, t in state.items()}, exact), base=sd1.base)
    layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    parts = {f"{layer}.lora_down.weight": normal(0, 2, 16), f"{layer}.lora_up.weight": normal(1, 16, 2)}
    tensors = {k: torch.tensor(v, dtype=torch.float32).to(getattr(torch, kind)) for k, v in parts.items()}
    tensors[f"{layer}.alpha"] = torch.tensor(2.0)
    merged, same = (
        lora.merge(pipe.params, save(lora_file, tmp_path / name), 1.0)["unet"]
        for pipe, lora_file, name in (
            (small, tensors, "lora8.safetensors"),
            (want, {k: t.float() for k, t in tensors.items()}, "lora32.safetensors"),
        )
    )
    changed = [name for name in merged if not np.array_equal(merged[name], small.params["unet"][name])]
    assert changed == ["mid_block.attentions.0.transformer_blocks.0.attn1.to_q.kernel"]
    for name, value in same.items():
        np.testing.assert_array_equal(merged[name], value, err_msg=name)
    for net, params in want.params.items():
        for name, value in params.items():
            np.testing.assert_array_equal(small.params[net][name], value, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("part,name", [("first_stage_model.", "vae"), ("cond_stage_model.", "text_encoder")])
def test_a_part_that_a_single_file_lacks_comes_from_the_base(part, name, sd1, tmp_path):
    file = save({k: v for k, v in sd1.state.items() if not k.startswith(part)}, tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match=f"has no {name}; that of base=.* is used"):
        assert_is(load(file, base=sd1.base).params, sd1.pipe)


@pytest.mark.slow
def test_ema_weights_are_read_when_asked_for(sd1, tmp_path):
    unet = {key: tensor for key, tensor in sd1.state.items() if key.startswith("model.diffusion_model.")}
    ema = {"model_ema." + key.removeprefix("model.").replace(".", ""): tensor + 1 for key, tensor in unet.items()}
    file = save(sd1.state | ema, tmp_path / "model.safetensors")
    assert_is(load(file, base=sd1.base).params, sd1.pipe)
    params = pipeline.load(file, variant="ema", attention="xla", base=sd1.base).params
    for name, value in sd1.ours.params["unet"].items():
        np.testing.assert_array_equal(params["unet"][name], value + 1, err_msg=name)
    with pytest.raises(ValueError, match=r"no complete EMA copy .* run without config\.weights_variant=ema: \d+"):
        pipeline.load(sd1.file, variant="ema", attention="xla", base=sd1.base)


@pytest.mark.slow
def test_a_variant_that_only_some_folders_have_is_used_there(sd1, tmp_path):
    folder = tmp_path / "some"
    shutil.copytree(sd1.base, folder)
    half = folder / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    with pytest.raises(FileNotFoundError, match="has no variant 'fp16'"):
        pipeline.load(str(folder), variant="fp16", attention="xla")
    copy.deepcopy(sd1.pipe.unet).half().save_pretrained(folder / "unet", variant="fp16")
    with pytest.warns(UserWarning, match="has no weights of variant 'fp16'; its usual ones are used") as told:
        params = pipeline.load(str(folder), variant="fp16", attention="xla").params
    assert half.is_file() and len(told) == 2
    for name, value in sd1.ours.params["unet"].items():
        np.testing.assert_array_equal(params["unet"][name], value.astype(np.float16).astype(np.float32), err_msg=name)
    for name, value in sd1.ours.params["vae"].items():
        np.testing.assert_array_equal(params["vae"][name], value, err_msg=name)


@pytest.mark.slow
def test_a_file_of_another_model_is_refused_in_one_short_line(sd1, torch, tmp_path):
    """An SDXL file has two text encoders and another UNet: thousands of keys that do not fit."""
    state = sd1.state | {f"conditioner.embedders.{i}.weight": torch.ones(1) for i in range(3000)}
    for tensors in (state, {key: tensor for key, tensor in state.items() if "conditioner" in key}):
        with pytest.raises(ValueError) as error:
            load(save(tensors, tmp_path / "xl.safetensors"), base=sd1.base)
        assert "\n" not in str(error.value) and len(str(error.value)) < 2000
        assert re.search(r"and \d{4} more", str(error.value))


# ---------------------------------------------------------------- the released directories


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """XCLiu's layout: an SD 1.5 directory of 2022 whose UNet is a flow: `.bin`, SD's scheduler, safety checker."""
    torch = references()
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    checker = StableDiffusionSafetyChecker(CLIPConfig(text_config=small, vision_config=small | {"image_size": 32}))
    folder = tmp_path_factory.mktemp("released")
    pipe = make_directory(
        folder, "flat", safety_checker=checker, feature_extractor=CLIPImageProcessor(), requires_safety_checker=True
    )
    for path in folder.rglob("model.safetensors"):  # transformers 5 writes no `.bin`
        torch.save(safetensors.torch.load_file(path), path.with_name("pytorch_model.bin"))
        path.unlink()
    state = state_of(pipe.text_encoder) | {"text_model.embeddings.position_ids": torch.arange(16)[None]}
    torch.save(state, folder / "text_encoder" / "pytorch_model.bin")
    return folder, pipe


@pytest.mark.slow
def test_the_released_layout_is_read_and_gives_the_released_image(released, torch):
    folder, pipe = released
    assert not list(folder.rglob("*.safetensors")) and (folder / "safety_checker" / "pytorch_model.bin").is_file()
    ours = load(folder)
    assert_is(ours.params, pipe)
    dynamics = sampling.read_dynamics(ours.scheduler, ours.index, "flow")
    generate = jax.jit(
        sampling.make_generate(ours.nets, sampling.make_solve(ours.nets["unet"].apply, dynamics, "auto", 1, 1.0))
    )
    X0, ids = normal(0, 2, 8, 8, 4), ours.tokenizer(["red apple", "house"])
    with torch.no_grad():
        z = torch.tensor(X0.transpose(0, 3, 1, 2))
        text = pipe.text_encoder(torch.tensor(ids, dtype=torch.long)).last_hidden_state
        X1 = z + pipe.unet(z, torch.full((2,), 1000.0), text).sample
        pixels = pipe.vae.decode(X1 / 0.18215).sample.clamp(-1, 1).permute(0, 2, 3, 1).numpy()
    got = np.asarray(generate(ours.params, ids, ours.tokenizer([""]), X0)[0], float)
    assert relative(got, np.round(255 * (pixels / 2 + 0.5))) < 1e-3  # a few bytes round differently


def test_a_saved_pipeline_lists_no_output_filter(released, tmp_path):
    from diffusers import StableDiffusionPipeline

    pipeline.save(load(released[0]), tmp_path / "copy")
    assert json.loads((tmp_path / "copy" / "model_index.json").read_text())["safety_checker"] == [None, None]
    assert_is(load(tmp_path / "copy").params, StableDiffusionPipeline.from_pretrained(tmp_path / "copy"))
