"""LoRA files and delta weights against PyTorch diffusers and peft, and the stages that use them."""

import json
import types
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
from helpers import load, make_directory, read_config, relative, state_of, torch_names
from PIL import Image

from instaflow_jax import main
from instaflow_jax.stages.common import loading
from instaflow_jax.stages.generate.stage import read_job
from instaflow_jax.weights import lora, port
from instaflow_jax.weights.delta import Delta, add_delta

UNET = {  # layer → rank; every type of layer that files contain: linear, 1×1 and 3×3 convolutions
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": 4,
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0": 2,
    "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj": 3,
    "down_blocks.0.attentions.0.proj_in": 4,
    "mid_block.attentions.0.proj_out": 1,
    "down_blocks.0.resnets.0.conv1": 4,
    "up_blocks.1.resnets.0.conv_shortcut": 2,
    "down_blocks.0.downsamplers.0.conv": 3,
    "up_blocks.0.upsamplers.0.conv": 4,
}
TEXT = {
    "text_model.encoder.layers.0.self_attn.q_proj": 4,
    "text_model.encoder.layers.0.self_attn.out_proj": 4,
    "text_model.encoder.layers.1.mlp.fc1": 2,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    pipe = make_directory(folder, "flat")
    return types.SimpleNamespace(folder=folder, pipe=pipe, ours=load(folder))


def layers(pipe, seed=0):
    """(network, module, down, up) of a random LoRA of `UNET` and `TEXT`, as large as the weights, so errors show."""
    import torch

    draw = torch.Generator().manual_seed(seed)
    for net, ranks in (("unet", UNET), ("text_encoder", TEXT)):
        state = state_of(getattr(pipe, net))
        for module, rank in ranks.items():
            outputs, inputs, *kernel = state[f"{module}.weight"].shape
            yield (
                net,
                module,
                torch.randn(rank, inputs, *kernel, generator=draw) / 4,
                torch.randn(outputs, rank, *[1] * len(kernel), generator=draw) / 4,
            )


def kohya(pipe, seed=0):
    import torch

    state = {}
    for net, module, down, up in layers(pipe, seed):
        name = kohya_name(net, module)
        state |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(1.5)}
    return state


def kohya_name(net, module, text="lora_te_"):
    return {"unet": "lora_unet_", "text_encoder": text}[net] + module.replace(".", "_")


def without_alphas(pipe, seed=0):
    return {key: t for key, t in kohya(pipe, seed).items() if not key.endswith(".alpha")}


def plain_sum(pipe):
    """kohya's file of W + up@down: diffusers drops the alpha of a `to_out` that differs from the others', so all have
    the same, and `up` makes good for it."""
    state = kohya(pipe)
    for net, module, down, up in layers(pipe):
        state[f"{kohya_name(net, module)}.lora_up.weight"] = up * (len(down) / 1.5)
    return state


def diffusers(pipe, seed=0):
    state = {}
    for net, module, down, up in layers(pipe, seed):
        state |= {f"{net}.{module}.lora_A.weight": down, f"{net}.{module}.lora_B.weight": up}
    return state


def write(state, path):
    safetensors.torch.save_file(state, path)
    return str(path)


def fused(tiny, *files):
    """PyTorch diffusers' pipeline with these (file, scale) fused in."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(tiny.folder)
    for path, scale in files:
        pipe.load_lora_weights(Path(path).parent, weight_name=Path(path).name)
        pipe.fuse_lora(lora_scale=scale)
        pipe.unload_lora_weights()
    return pipe


def assert_close(params, want, start, changed):
    """All weights equal `want` to 1e-5; exactly those in `changed` differ from `start`, and by much."""
    got, before = torch_names(params), torch_names(start)
    assert got.keys() == want.keys()
    differing = {key.removesuffix(".weight") for key in got if not np.array_equal(got[key], before[key])}
    assert differing == set(changed)
    for key, value in want.items():
        assert relative(got[key], value) < 1e-5, key
        if key.removesuffix(".weight") in changed:
            assert relative(got[key], before[key]) > 0.05, key


@pytest.mark.parametrize(("form", "same"), [(kohya, kohya), (without_alphas, plain_sum), (diffusers, plain_sum)])
def test_a_merged_file_equals_diffusers(form, same, tiny, tmp_path):
    """Without alphas every layer adds up@down, also where ranks differ (diffusers 0.39 scales by the common rank)."""
    path = write(form(tiny.pipe), tmp_path / "x.safetensors")
    reference = write(same(tiny.pipe), tmp_path / "reference.safetensors")
    params, theirs = lora.merge(tiny.ours.params, path, 0.8), fused(tiny, (reference, 0.8))
    for net, changed in (("unet", UNET), ("text_encoder", TEXT)):
        assert_close(params[net], state_of(getattr(theirs, net)), tiny.ours.params[net], changed)
    assert params["vae"].keys() == tiny.ours.params["vae"].keys()


def test_alpha_in_the_metadata_of_diffusers_is_used(tiny, tmp_path):
    from diffusers import StableDiffusionPipeline

    state = {key.removeprefix("unet."): t for key, t in diffusers(tiny.pipe).items() if ".attn1.to_q" in key}
    (key,) = (k for k in UNET if "attn1.to_q" in k)
    adapter = {"r": 4, "lora_alpha": 10, "target_modules": [key], "rank_pattern": {}, "alpha_pattern": {}}
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=state, unet_lora_adapter_metadata=adapter)
    path = str(tmp_path / "pytorch_lora_weights.safetensors")
    want = fused(tiny, (path, 1.0)).unet.state_dict()
    assert_close(lora.merge(tiny.ours.params, path, 1.0)["unet"], want, tiny.ours.params["unet"], [key])
    plain = write({f"unet.{k}": t for k, t in state.items()}, tmp_path / "plain.safetensors")
    factor = [
        torch_names(lora.merge(tiny.ours.params, p, 1.0)["unet"])[f"{key}.weight"]
        - torch_names(tiny.ours.params["unet"])[f"{key}.weight"]
        for p in (path, plain)
    ]
    assert relative(factor[0], 2.5 * factor[1]) < 1e-5


@pytest.mark.parametrize("pattern", [{}, {"conv1": 20}], ids=["alpha", "alpha_pattern"])
def test_a_lora_trained_by_peft_is_merged_as_by_peft(pattern, tiny, torch, tmp_path):
    import peft
    from diffusers import UNet2DConditionModel

    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["to_k", "conv1", "proj_in"], alpha_pattern=pattern)
    model = peft.get_peft_model(UNet2DConditionModel.from_pretrained(tiny.folder / "unet"), config)
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.3)
    model.save_pretrained(tmp_path)
    want = model.merge_and_unload().state_dict()
    changed = [name for name, m in tiny.pipe.unet.named_modules() if name.endswith(("to_k", "conv1", "proj_in"))]
    params = lora.merge(tiny.ours.params, tmp_path / "adapter_model.safetensors", 1.0)
    assert_close(params["unet"], want, tiny.ours.params["unet"], changed)


def test_the_names_of_the_first_diffusers_versions_are_read(tiny, tmp_path):
    new, old = {}, {}
    for net, module, down, up in layers(tiny.pipe):
        if ".attn" in module or net == "text_encoder":
            new |= {f"{net}.{module}.lora_A.weight": down, f"{net}.{module}.lora_B.weight": up}
            head, _, last = module.removesuffix(".0").rpartition(".")
            where = f"{net}.{head}.processor.{last}_lora" if net == "unet" else f"{net}.{module}.lora_linear_layer"
            old |= {f"{where}.down.weight": down, f"{where}.up.weight": up}
    a, b = (
        lora.merge(tiny.ours.params, write(state, tmp_path / f"{i}.safetensors"), 1.0)
        for i, state in enumerate((new, old))
    )
    for net in ("unet", "text_encoder"):
        assert any(not np.array_equal(a[net][name], p) for name, p in tiny.ours.params[net].items())
        for name, value in a[net].items():
            np.testing.assert_array_equal(b[net][name], value, err_msg=name)


def processor(net, module):
    """The first diffusers format, as `unet.save_attn_procs` wrote it: `attn1.processor.to_q_lora`, without `unet.`."""
    head, _, last = module.removesuffix(".0").rpartition(".")
    return f"{head}.processor.{last}_lora" if net == "unet" and ".attn" in module else None


def text_processor(net, module):
    """The text encoder of the first diffusers versions: `self_attn.to_q_lora`."""
    old = {"q_proj": "to_q_lora", "out_proj": "to_out_lora"}
    head, _, last = module.rpartition(".")
    return f"{net}.{head}.{old[last]}" if last in old else None


def short(module):
    return module.removeprefix("text_model.")


KOHYA, DIFFUSERS, OLD = ("lora_down", "lora_up"), ("lora_A", "lora_B"), ("down", "up")
SPELLINGS = {  # network and module → key, or None where the format has none; names of down and up
    "UNet without unet.": (lambda net, module: module if net == "unet" else None, DIFFUSERS),
    "processors without unet.": (processor, OLD),
    "processors of the text encoder": (text_processor, OLD),
    "kohya's lora_te1_": (lambda net, module: kohya_name(net, module, "lora_te1_"), KOHYA),
    "kohya without text_model": (lambda net, module: kohya_name(net, short(module)), KOHYA),
    "diffusers without text_model": (lambda net, module: f"{net}.{short(module)}", DIFFUSERS),
    "diffusers before peft without text_model": (
        lambda net, module: f"{net}.{short(module)}.lora_linear_layer" if net == "text_encoder" else None,
        OLD,
    ),
}


@pytest.mark.parametrize(("key", "parts"), SPELLINGS.values(), ids=SPELLINGS)
def test_other_spellings_of_the_keys_are_read(key, parts, tiny, tmp_path):
    """Each gives what PyTorch diffusers makes of the same layers in kohya's spelling."""
    state, reference, changed = {}, {}, {"unet": [], "text_encoder": []}
    full = plain_sum(tiny.pipe)
    for net, module, down, up in layers(tiny.pipe):
        if name := key(net, module):
            state |= {f"{name}.{part}.weight": array for part, array in zip(parts, (down, up), strict=True)}
            changed[net].append(module)
            reference |= {k: t for k, t in full.items() if k.partition(".")[0] == kohya_name(net, module)}
    got = lora.merge(tiny.ours.params, write(state, tmp_path / "x.safetensors"), 1.0)
    theirs = fused(tiny, (write(reference, tmp_path / "reference.safetensors"), 1.0))
    for net, names in changed.items():
        assert_close(got[net], state_of(getattr(theirs, net)), tiny.ours.params[net], names)


@pytest.mark.parametrize("config", [True, False])
def test_a_text_encoder_of_peft_without_text_model_is_merged_as_by_peft(config, tiny, torch, tmp_path):
    """As peft saves it from transformers 5.6; without its config the alpha is the rank, with a warning."""
    import peft
    from transformers import CLIPTextModel

    alpha = 6 if config else 4
    settings = peft.LoraConfig(r=4, lora_alpha=alpha, target_modules=["k_proj", "fc2"])
    model = peft.get_peft_model(CLIPTextModel.from_pretrained(tiny.folder / "text_encoder"), settings)
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.3)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    state = safetensors.torch.load_file(path)
    write({key.replace("text_model.", ""): t for key, t in state.items()}, path)
    want = state_of(model.merge_and_unload())
    changed = [key.removesuffix(".weight") for key in want if key.endswith(("k_proj.weight", "fc2.weight"))]
    if config:
        params = lora.merge(tiny.ours.params, path, 1.0)
    else:
        (tmp_path / "adapter_config.json").unlink()
        with pytest.warns(UserWarning, match=r"has no alpha and no adapter_config\.json beside it"):
            params = lora.merge(tiny.ours.params, path, 1.0)
    assert_close(params["text_encoder"], want, tiny.ours.params["text_encoder"], changed)


def test_the_config_of_another_file_in_the_folder_is_not_used(tiny, tmp_path):
    """kohya's and diffusers' files beside an `adapter_config.json` are not peft's."""
    path = write(diffusers(tiny.pipe), tmp_path / "x.safetensors")
    plain = lora.merge(tiny.ours.params, path, 1.0)["unet"]
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 400, "use_dora": True}))
    for name, value in lora.merge(tiny.ours.params, path, 1.0)["unet"].items():
        np.testing.assert_array_equal(value, plain[name], err_msg=name)


def test_files_add_up_and_a_negative_scale_undoes_them(tiny, tmp_path):
    first, second = (write(kohya(tiny.pipe, seed), tmp_path / f"{seed}.safetensors") for seed in (1, 2))
    both = load(tiny.folder, loras=[(first, 0.8), (second, 0.5)]).params
    theirs = fused(tiny, (first, 0.8), (second, 0.5))
    assert_close(both["unet"], theirs.unet.state_dict(), tiny.ours.params["unet"], UNET)
    same = lora.merge(tiny.ours.params, first, 0.0)["unet"]
    back = lora.merge(lora.merge(both, second, -0.5), first, -0.8)["unet"]
    for name, value in tiny.ours.params["unet"].items():
        np.testing.assert_array_equal(same[name], value)
        np.testing.assert_allclose(back[name], value, atol=1e-6)


def test_linear_layers_and_1x1_convolutions_are_interchangeable(tiny, tmp_path):
    """SD 2.x has linear layers where SD 1.x has 1×1 convolutions; they compute the same."""
    state = {k: t for k, t in kohya(tiny.pipe).items() if "proj_in" in k}
    flat = {k: t[..., 0, 0].contiguous() if t.ndim == 4 else t for k, t in state.items()}
    a, b = (
        lora.merge(tiny.ours.params, write(s, tmp_path / f"{i}.safetensors"), 1.0) for i, s in enumerate((state, flat))
    )
    name = "down_blocks.0.attentions.0.proj_in.kernel"
    np.testing.assert_array_equal(a["unet"][name], b["unet"][name])
    assert relative(a["unet"][name], tiny.ours.params["unet"][name]) > 0.05


def edited(tiny, edit):
    state = kohya(tiny.pipe)
    edit(state)
    return state


Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
BARE_Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    "edit,words",
    [
        (
            lambda s: s.update({"lora_unet_nowhere.lora_up.weight": s[f"{Q}.lora_up.weight"].clone()}),
            ["1 unknown: lora_unet_nowhere.lora_up.weight"],
        ),
        (lambda s: s.update({f"{Q}.dora_scale": s[f"{Q}.alpha"].clone()}), ["1 unknown", f"{Q}.dora_scale"]),
        (lambda s: s.pop(f"{Q}.lora_up.weight"), ["1 without up or down", Q]),
        (
            lambda s: s.update({k.replace(Q, BARE_Q): t.clone() for k, t in s.items() if Q in k}),
            ["2 for the same layer", Q, BARE_Q],
        ),
        (
            lambda s: s.update({f"{Q}.alpha": s[f"{Q}.lora_up.weight"][0].clone()}),
            ["1 misshapen", f"{Q} alpha (4,)"],
        ),
        (
            lambda s: s.update({f"{Q}.lora_down.weight": s[f"{Q}.lora_down.weight"][:0].clone()}),
            ["1 misshapen", f"{Q} down (0, 8)"],
        ),
        (lambda s: s.update({f"{Q}.lora_down.weight": s[f"{Q}.alpha"].clone()}), ["1 misshapen", f"{Q} down ()"]),
        (
            lambda s: s.update({f"{Q}.lora_up.weight": s[f"{Q}.lora_up.weight"][:, :1].clone()}),
            ["1 misshapen", "attn1.to_q", "rank"],
        ),
        (
            lambda s: s.update({f"{Q}.lora_down.weight": s[f"{Q}.lora_down.weight"][:, :5].clone()}),
            [
                "1 misshapen: down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight of unet",
                "(5, 8)",
                "(8, 8)",
            ],
        ),
    ],
)
def test_mismatches_are_named(edit, words, tiny, tmp_path):
    path = write(edited(tiny, edit), tmp_path / "bad.safetensors")
    with pytest.raises(ValueError) as error:
        lora.merge(tiny.ours.params, path, 1.0)
    assert all(word in str(error.value) for word in [path, *words]), str(error.value)


def test_other_formulas_of_peft_are_refused(tiny, tmp_path):
    path = tmp_path / "adapter_model.safetensors"
    write(
        {key.replace("unet.", "base_model.model."): t for key, t in diffusers(tiny.pipe).items() if "unet." in key},
        path,
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 4, "use_dora": True}))
    with pytest.raises(ValueError, match="trained with use_dora"):
        lora.merge(tiny.ours.params, path, 1.0)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 4, "init_lora_weights": "pissa_niter_4"}))
    with pytest.raises(ValueError, match="trained with init_lora_weights=pissa_niter_4, so"):
        lora.merge(tiny.ours.params, path, 1.0)
    damaged = tmp_path / "damaged.safetensors"
    safetensors.torch.save_file(diffusers(tiny.pipe), damaged, {"lora_adapter_metadata": '{"unet.r": 4'})
    with pytest.raises(
        ValueError, match=r"damaged\.safetensors: lora_adapter_metadata '{\"unet.r\": 4' is not a JSON obj"
    ):
        lora.merge(tiny.ours.params, damaged, 1.0)
    with pytest.raises(FileNotFoundError, match="there is no LoRA file"):
        lora.merge(tiny.ours.params, tmp_path / "nowhere.safetensors", 1.0)


# ---------------------------------------------------------------- delta weights


@pytest.fixture(scope="module")
def custom(tmp_path_factory):
    folder = tmp_path_factory.mktemp("custom")
    return types.SimpleNamespace(folder=folder, pipe=make_directory(folder, "flat", seed=11))


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    folder = tmp_path_factory.mktemp("origin")
    return types.SimpleNamespace(folder=folder, pipe=make_directory(folder, "flat", seed=21))


def test_a_delta_changes_the_unet_and_replaces_decoder_and_text_encoder(tiny, custom, origin, torch):
    got = load(tiny.folder, delta=Delta(str(custom.folder), str(origin.folder), 0.7)).params
    start, new, old = (pipe.unet.state_dict() for pipe in (tiny.pipe, custom.pipe, origin.pipe))
    for key, value in torch_names(got["unet"]).items():
        assert relative(value, start[key] + 0.7 * (new[key] - old[key])) < 1e-6, key
    for net in ("vae", "text_encoder"):
        for key, value in torch_names(got[net]).items():
            np.testing.assert_array_equal(value, state_of(getattr(custom.pipe, net))[key])


def test_a_delta_from_the_model_itself_gives_the_custom_model_and_combines_with_loras(tiny, custom, tmp_path):
    path = write(kohya(tiny.pipe), tmp_path / "x.safetensors")
    delta = Delta(str(custom.folder), str(tiny.folder), 1.0)
    got = load(tiny.folder, delta=delta, loras=[(path, 0.8)]).params
    want = lora.merge(load(custom.folder).params, path, 0.8)
    for net, params in want.items():
        for name, value in params.items():
            np.testing.assert_allclose(got[net][name], value, atol=1e-6, err_msg=f"{net} {name}")


def test_a_delta_of_another_architecture_is_refused(tiny):
    params = tiny.ours.params["unet"]
    other = {name: p for name, p in params.items() if name != "conv_in.bias"} | {
        "conv_out.bias": np.zeros(9, np.float32)
    }
    with pytest.raises(ValueError) as error:
        add_delta(params, params, other, 1.0, names={"custom": "A", "origin": "B"})
    for words in ("origin='B' has another architecture", "1 missing: conv_in.bias", "conv_out.bias (9,), not (4,)"):
        assert words in str(error.value)


# ---------------------------------------------------------------- the stages


def config(stage, **fields):
    config = read_config(stage)
    config.update(fields)
    return config


@pytest.mark.slow
def test_sampling_uses_loras_and_delta_from_the_config(tiny, custom, tmp_path):
    path = write(kohya(tiny.pipe), tmp_path / "x.safetensors")
    settings = {"model": str(tiny.folder), "N": 1, "alpha": 1.0, "prompts": "red apple", "seeds": (0,)}
    changes = {
        "loras": f"{path}=0.5|{path}",
        "delta": {"custom": str(custom.folder), "origin": str(tiny.folder), "scale": 1.0},
    }
    images = []
    for name, change in (("plain", {}), ("changed", changes)):
        main.run(config("sample", **settings, **change), str(tmp_path / name))
        (file,) = (tmp_path / name / "sample").glob("000*.png")
        images.append(Image.open(file))
    plain, changed = images
    assert changed.text["loras"] == changes["loras"] and str(custom.folder) in changed.text["delta"]
    assert "delta" not in plain.text
    assert np.abs(np.asarray(changed, int) - np.asarray(plain, int)).max() > 10


def test_the_pair_manifest_depends_on_the_weights(tiny, tmp_path):
    path = write(kohya(tiny.pipe), tmp_path / "x.safetensors")
    settings = {"model": str(tiny.folder), "count": 4, "N": 1}
    plain, changed = (read_job(config("generate", **settings, loras=loras)).recipe["teacher"] for loras in ("", path))
    assert {name for name in plain if plain[name] != changed[name]} == {"unet", "text_encoder"}


def test_scales_are_read_from_the_config():
    want = (("a.safetensors", 0.8), ("b.safetensors", 1.0), ("c", -0.1))
    assert loading.read_scales("loras", "a.safetensors=0.8| b.safetensors |c=-1e-1") == want
    assert loading.read_scales("loras", "") == ()
    with pytest.raises(ValueError, match=r"the scale 'much' of a\.safetensors is not a number"):
        loading.read_scales("loras", "a.safetensors=much")


def test_the_delta_of_a_convolution_by_hand(tiny):
    """One 3×3 layer by hand: the sum over ranks of an outer product, for each position of the kernel."""
    down, up = np.arange(2 * 3 * 9.0).reshape(2, 3, 3, 3), np.arange(4 * 2.0).reshape(4, 2, 1, 1)
    want = sum(up[:, r, 0, 0][:, None, None, None] * down[r] for r in range(2)) * 3.0 / 2
    np.testing.assert_allclose(lora.Layer(down, up, 3.0).delta(), want)
    assert port.from_torch("x.kernel", want).shape == (3, 3, 3, 4)
