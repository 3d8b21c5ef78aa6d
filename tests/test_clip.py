"""CLIP against transformers: both towers, both activations, both end-of-text rules, every file form."""

import copy
import dataclasses
import json

import jax
import numpy as np
import pytest
from helpers import TRANSFORMERS_5, normal, projected, randomize, references, relative, state_of, with_flax_classes

from instaflow_jax.models.clip import CLIPModel, CLIPTextModel

TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 12,
    "projection_dim": 24,
    "bos_token_id": 97,
    "eos_token_id": 98,
    "pad_token_id": 98,
}
VISION = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 24,
    "patch_size": 8,
    "projection_dim": 24,
}
IDS = np.array([[97, 5, 6, 7, 98, 98, 98, 98, 98, 98, 98, 98], [97, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 98]])


def text_model(**changes):
    references()
    from transformers import CLIPTextConfig
    from transformers import CLIPTextModel as Reference

    return randomize(Reference(CLIPTextConfig(**TEXT | changes)))


def clip_model(act):
    references()
    from transformers import CLIPConfig
    from transformers import CLIPModel as Reference

    towers = {"text_config": TEXT | {"hidden_act": act}, "vision_config": VISION | {"hidden_act": act}}
    return randomize(Reference(CLIPConfig(**towers, projection_dim=24)))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"hidden_act": "gelu"},
        {"eos_token_id": 2},
        {"layer_norm_eps": 1e-3},
    ],
    ids=["quick_gelu", "gelu", "legacy-eos", "eps"],
)
def test_text_encoder_equals_transformers(changes, torch, tmp_path):
    reference = text_model(**changes)
    reference.save_pretrained(tmp_path)
    net, params = CLIPTextModel.from_pretrained(tmp_path)
    with torch.no_grad():
        want = reference(torch.tensor(IDS))
    got = jax.jit(net.apply)(params, IDS)
    assert relative(got.last_hidden_state, want.last_hidden_state) < 1e-5
    assert relative(got.pooler_output, want.pooler_output) < 1e-5


@pytest.mark.slow
def test_the_activation_matters_more_than_the_tolerance(tmp_path):
    text_model().save_pretrained(tmp_path)
    net, params = CLIPTextModel.from_pretrained(tmp_path)
    other = CLIPTextModel.from_config(net.raw_config | {"hidden_act": "gelu"})
    assert relative(other.apply(params, IDS)[0], net.apply(params, IDS)[0]) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_both_towers_equal_transformers(act, torch, tmp_path):
    reference = clip_model(act)
    reference.save_pretrained(tmp_path)
    net, params = CLIPModel.from_pretrained(tmp_path)
    pixels = normal(0, 3, 24, 24, 3)
    with torch.no_grad():
        want = reference(torch.tensor(IDS), torch.tensor(pixels.transpose(0, 3, 1, 2)))
        features = (
            reference.get_text_features(torch.tensor(IDS)),
            reference.get_image_features(torch.tensor(pixels.transpose(0, 3, 1, 2))),
        )
    got = jax.jit(net.apply)(params, IDS, pixels)
    for field in ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds"):
        assert relative(getattr(got, field), getattr(want, field)) < 1e-5, field
    assert relative(net.apply(params, IDS, method="get_text_features"), projected(features[0])) < 1e-5
    assert relative(net.apply(params, pixels, method="get_image_features"), projected(features[1])) < 1e-5


@pytest.mark.slow
@with_flax_classes
def test_text_encoder_beside_the_old_flax_class(torch, tmp_path, capsys):
    """Second reference: transformers' FlaxCLIPTextModel on the file we write for it, its error beside ours."""
    from transformers import FlaxCLIPTextModel

    reference = text_model()
    reference.save_pretrained(tmp_path)
    net, params = CLIPTextModel.from_pretrained(tmp_path)
    net.save_pretrained(params, tmp_path / "flax", form="flax")
    with torch.no_grad():
        want = reference(torch.tensor(IDS)).last_hidden_state
    ours = relative(net.apply(params, IDS).last_hidden_state, want)
    theirs = relative(FlaxCLIPTextModel.from_pretrained(str(tmp_path / "flax"))(IDS).last_hidden_state, want)
    with capsys.disabled():
        print(f"\nCLIP text: ours {ours:.1e}, transformers' Flax {theirs:.1e}", end="")
    assert ours < 1e-5 and theirs < 1e-5


def weights(reference):
    return {key: tensor.numpy() for key, tensor in reference.state_dict().items() if "position_ids" not in key}


as_bin = pytest.mark.skipif(TRANSFORMERS_5, reason="transformers 5 writes no .bin files")


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"max_shard_size": "20KB"},
        pytest.param({"safe_serialization": False}, marks=as_bin),
        {"variant": "fp16"},
        pytest.param({"safe_serialization": False, "max_shard_size": "20KB"}, marks=as_bin),
    ],
    ids=["safetensors", "sharded", "bin", "fp16", "bin-sharded"],
)
def test_every_file_format_of_transformers_is_read(form, tmp_path):
    reference = clip_model("gelu")
    half = "variant" in form
    (reference.half() if half else reference).save_pretrained(tmp_path / "theirs", **form)
    net, params = CLIPModel.from_pretrained(tmp_path / "theirs", variant=form.get("variant"))
    net.save_pretrained(params, tmp_path / "ours", **({"dtype": np.float16, "variant": "fp16"} if half else {}))
    from transformers import CLIPModel as Reference

    restored = Reference.from_pretrained(tmp_path / "ours", variant=form.get("variant"))
    want, got = weights(reference), weights(restored)
    assert got.keys() == want.keys()
    for key, array in want.items():
        assert got[key].shape == array.shape, key  # assert_array_equal would take (1,) for ()
        np.testing.assert_array_equal(got[key], array, err_msg=key)
    ours = CLIPModel.from_pretrained(tmp_path / "ours", variant=form.get("variant"))[1]
    assert {k: (p.shape, p.tobytes()) for k, p in ours.items()} == {
        k: (p.shape, p.tobytes()) for k, p in params.items()
    }


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "stream"])
def test_both_containers_of_torch_save_give_the_same_weights(legacy, torch, tmp_path):
    reference = clip_model("gelu")
    reference.save_pretrained(tmp_path / "safetensors")
    reference.config.save_pretrained(tmp_path / "pickled")
    torch.save(
        reference.state_dict(), tmp_path / "pickled" / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy
    )
    want, got = (CLIPModel.from_pretrained(tmp_path / name)[1] for name in ("safetensors", "pickled"))
    assert {k: (p.shape, p.tobytes()) for k, p in got.items()} == {k: (p.shape, p.tobytes()) for k, p in want.items()}


def test_configs_mean_the_same_as_in_transformers():
    """Absent keys, and the older `*_config_dict`, which replace `*_config` even where they lack a key."""
    references()
    from transformers import CLIPConfig

    for raw in (
        {},
        {"text_config": TEXT, "vision_config": VISION},
        {"text_config": TEXT, "text_config_dict": None},
        {"text_config": TEXT, "text_config_dict": {"hidden_size": 64}, "vision_config_dict": {}},
    ):
        ours, theirs = CLIPModel.Config.from_dict(raw), CLIPConfig(**copy.deepcopy(raw))
        for tower in ("text_config", "vision_config"):
            want = getattr(theirs, tower).to_dict()
            got = dataclasses.asdict(getattr(ours, tower))
            assert got == {key: want[key] for key in got}
        assert (ours.projection_dim, ours.logit_scale_init_value) == (
            theirs.projection_dim,
            theirs.logit_scale_init_value,
        )


def test_a_network_made_here_opens_in_transformers(torch, tmp_path):
    references()
    from transformers import AutoModel

    net = CLIPTextModel.from_config(TEXT)
    params = net.init(jax.random.key(0))
    net.save_pretrained(params, tmp_path)
    theirs = AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        want = theirs(torch.tensor(IDS)).last_hidden_state
    assert type(theirs).__name__ == "CLIPTextModel"
    assert relative(jax.jit(net.apply)(params, IDS).last_hidden_state, want) < 1e-5


@pytest.mark.slow
@with_flax_classes
def test_flax_files_go_both_ways(tmp_path):
    from transformers import FlaxCLIPTextModel

    reference = text_model()
    reference.save_pretrained(tmp_path)
    net, params = CLIPTextModel.from_pretrained(tmp_path)
    net.save_pretrained(params, tmp_path / "ours", form="flax")
    FlaxCLIPTextModel.from_pretrained(str(tmp_path / "ours")).save_pretrained(str(tmp_path / "theirs"))
    assert not list((tmp_path / "theirs").glob("*.safetensors"))
    restored = CLIPTextModel.from_pretrained(tmp_path / "theirs")[1]
    assert restored.keys() == params.keys()
    for name, p in params.items():
        np.testing.assert_array_equal(restored[name], p, err_msg=name)


def test_text_encoders_with_and_without_prefix_and_with_buffers_are_read(torch, tmp_path):
    reference = text_model()
    reference.config.save_pretrained(tmp_path)
    params = []
    for strip in (False, True):
        state = {key.removeprefix("text_model.") if strip else key: t for key, t in state_of(reference).items()}
        prefix = "" if strip else "text_model."
        state[f"{prefix}embeddings.position_ids"] = torch.arange(12)[None]
        torch.save(state, tmp_path / "pytorch_model.bin")
        params.append(CLIPTextModel.from_pretrained(tmp_path)[1])
    assert params[0].keys() == params[1].keys()
    assert all(np.array_equal(p, params[1][name]) for name, p in params[0].items())


def test_wrong_inputs_and_configs_are_named(tmp_path):
    net = CLIPModel.from_config({"text_config": TEXT, "vision_config": VISION, "projection_dim": 24})
    params = net.init(jax.random.key(0))
    with pytest.raises(ValueError, match="prompts of 13 tokens exceed the text encoder's 12 positions"):
        net.apply(params, np.zeros((1, 13), int), method="get_text_features")
    with pytest.raises(ValueError, match="images of 32x24 pixels; this CLIP takes 24x24"):
        net.apply(params, np.zeros((1, 32, 24, 3)), method="get_image_features")
    with pytest.raises(ValueError, match="hidden_size=32 is not divisible by num_attention_heads=5"):
        CLIPTextModel.from_config(TEXT | {"num_attention_heads": 5})
    with pytest.raises(ValueError, match="activation 'tanh' is not one of"):
        CLIPTextModel.from_config(TEXT | {"hidden_act": "tanh"})
    text_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": 40, "num_attention_heads": 4}))
    with pytest.raises(ValueError, match=r"misshapen.*the config asks for"):
        CLIPTextModel.from_pretrained(tmp_path)
