"""Reading and writing weights: every file format to the bit, reference libraries as readers, broken files named."""

import json
import pickle
import shutil

import numpy as np
import pytest
from helpers import make_coco_models, randomize, references, with_flax_classes

from instaflow_jax import pipeline
from instaflow_jax.evals import clip_score
from instaflow_jax.infra import images
from instaflow_jax.models.clip import CLIPModel
from instaflow_jax.models.inception import InceptionV3
from instaflow_jax.models.lpips import LPIPS
from instaflow_jax.models.unet import UNet2DConditionModel
from instaflow_jax.models.vae import AutoencoderKL
from instaflow_jax.weights import lora, port, torch_file

COMMON = {"layers_per_block": 1, "norm_num_groups": 32}
UNET = {
    "block_out_channels": (32, 64),
    "cross_attention_dim": 8,
    "attention_head_dim": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "sample_size": 8,
} | COMMON
VAE = {
    "block_out_channels": (32, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "sample_size": 16,
} | COMMON


@pytest.fixture(scope="module")
def unet():
    references()
    from diffusers import UNet2DConditionModel as Reference

    return randomize(Reference(**UNET))


@pytest.fixture(scope="module")
def vae():
    references()
    from diffusers import AutoencoderKL as Reference

    return randomize(Reference(**VAE))


def expected(reference, net, dtype="float32"):
    """The reference's weights under our names, without going through a file."""
    state = {key: lambda t=t: t.numpy() for key, t in reference.state_dict().items()}
    params = port.fill(state, net.shapes, net.module.layout, source="memory")
    return {name: p.astype(dtype).astype("float32") for name, p in params.items()}


def assert_bit_equal(params, want):
    assert params.keys() == want.keys()
    for name, p in params.items():
        assert p.dtype == np.float32
        np.testing.assert_array_equal(p, want[name], err_msg=name)


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"max_shard_size": "100KB"},
        {"safe_serialization": False},
        {"safe_serialization": False, "max_shard_size": "100KB"},
        {"variant": "fp16"},
        {"variant": "fp16", "max_shard_size": "100KB"},
        {"variant": "fp16", "safe_serialization": False},
    ],
    ids=lambda form: "-".join(map(str, form.values())) or "safetensors",
)
def test_every_form_that_diffusers_writes_is_read(form, unet, tmp_path):
    half = "variant" in form
    (unet.half() if half else unet.float()).save_pretrained(tmp_path, **form)
    unet.float()
    net, params = UNet2DConditionModel.from_pretrained(tmp_path, variant=form.get("variant"))
    if "max_shard_size" in form:
        assert len(list(tmp_path.glob("*-of-*"))) > 1
    assert_bit_equal(params, expected(unet, net, "float16" if half else "float32"))


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "stream"])
def test_both_containers_of_torch_save_are_read(legacy, torch, tmp_path):
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    tensors = {
        "all": base,
        "part": base[1:3, ::2],
        "transposed": base.T,
        "half": base.half(),
        "brain": base.bfloat16(),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 2),
        "ids": torch.arange(5),
        "parameter": torch.nn.Parameter(base[0]),
    }
    torch.save(tensors, tmp_path / "x.bin", _use_new_zipfile_serialization=not legacy)
    read = torch_file.read(tmp_path / "x.bin")
    assert read.keys() == tensors.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(read[key].astype("float64"), tensor.detach().double().numpy(), err_msg=key)
        assert read[key].dtype.name == str(tensor.dtype).removeprefix("torch.")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": np.float16, "variant": "fp16"},
        {"shard_bytes": 100_000},
        {"form": "flax"},
        {"shard_bytes": 100_000, "dtype": np.float16, "variant": "fp16"},
    ],
    ids=["safetensors", "fp16", "sharded", "flax", "fp16-sharded"],
)
def test_what_we_write_we_read_and_so_does_diffusers(options, unet, vae, torch, tmp_path):
    from diffusers import AutoencoderKL as TorchVAE
    from diffusers import UNet2DConditionModel as TorchUNet

    for reference, theirs, ours in ((unet, TorchUNet, UNet2DConditionModel), (vae, TorchVAE, AutoencoderKL)):
        folder, variant = tmp_path / ours.__name__, options.get("variant")
        net = ours.from_config(dict(reference.config))
        want = expected(reference, net, "float16" if variant else "float32")
        net.save_pretrained(want, folder, **options)
        assert_bit_equal(ours.from_pretrained(folder, variant=variant)[1], want)
        assert not list(folder.glob("*.tmp"))
        if "form" not in options:
            read = theirs.from_pretrained(folder, variant=variant, low_cpu_mem_usage=False)
            assert_bit_equal(expected(read, net), want)


@pytest.mark.slow
@with_flax_classes
def test_the_old_flax_classes_read_our_file_and_we_read_theirs(unet, vae, tmp_path):
    """Names only; test_unet_vae runs the classes and so checks the values' layouts."""
    from diffusers import FlaxAutoencoderKL, FlaxUNet2DConditionModel

    for reference, flax, ours in (
        (unet, FlaxUNet2DConditionModel, UNet2DConditionModel),
        (vae, FlaxAutoencoderKL, AutoencoderKL),
    ):
        net, folder = ours.from_config(dict(reference.config)), tmp_path / ours.__name__
        want = expected(reference, net)
        net.save_pretrained(want, folder / "ours", form="flax")
        model, params = flax.from_pretrained(str(folder / "ours"))
        model.save_pretrained(str(folder / "theirs"), params=params)
        assert [p.name for p in (folder / "theirs").glob("*.msgpack")] == ["diffusion_flax_model.msgpack"]
        assert_bit_equal(ours.from_pretrained(folder / "theirs")[1], want)


def test_old_spellings_of_the_autoencoder_are_read(vae, torch, tmp_path):
    state = {}
    for key, tensor in vae.state_dict().items():
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            key = key.replace(f".{new}.", f".{old}.")
        state[key] = tensor
    assert any("proj_attn" in key for key in state)
    vae.save_config(tmp_path)
    torch.save(state, tmp_path / "diffusion_pytorch_model.bin")
    net, params = AutoencoderKL.from_pretrained(tmp_path)
    assert_bit_equal(params, expected(vae, net))


FLOAT8 = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")


@pytest.mark.parametrize("form", ["safetensors", "zip", "stream"])
def test_float8_is_read_exactly(form, torch, tmp_path):
    """Every bit pattern of every float8 type, and beside them the types that have no storage class in torch."""
    import safetensors.torch

    codes = torch.arange(256, dtype=torch.uint8).reshape(16, 16)
    tensors = {name: codes.clone().view(getattr(torch, name)) for name in FLOAT8}
    tensors |= {"wide": torch.tensor([[1, 2, 65535]]).to(torch.uint16), "brain": torch.ones(3, dtype=torch.bfloat16)}
    path = tmp_path / ("x.safetensors" if form == "safetensors" else "x.bin")
    if form == "safetensors":
        safetensors.torch.save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=form == "zip")
    stored = port.open_weights(path)
    assert stored.keys() == tensors.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(stored[key]().astype("float32"), tensor.to(torch.float32).numpy(), err_msg=key)


def test_a_network_in_float8_is_read_as_float32(unet, torch, tmp_path):
    import safetensors.torch

    unet.save_config(tmp_path)
    state = {key: tensor.to(torch.float8_e4m3fn) for key, tensor in unet.state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    net, params = UNet2DConditionModel.from_pretrained(tmp_path)
    want = {key: lambda t=t: t.float().numpy() for key, t in state.items()}
    assert_bit_equal(params, port.fill(want, net.shapes, net.module.layout, source="memory"))


def test_a_type_of_number_that_cannot_be_read_is_named(torch, tmp_path):
    import safetensors.torch

    safetensors.torch.save_file({"a": torch.zeros(2, dtype=torch.complex64)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"x\.safetensors: a has the type C64; convert it to one of F64"):
        port.open_weights(tmp_path / "x.safetensors")["a"]()


# ---------------------------------------------------------------- a hub id


def test_a_cached_hub_id_is_read_offline(unet, tmp_path, monkeypatch):
    from huggingface_hub import constants

    snapshot = tmp_path / "models--someone--tiny-sd" / "snapshots" / "abc"
    (snapshot.parent.parent / "refs").mkdir(parents=True)
    (snapshot.parent.parent / "refs" / "main").write_text("abc")
    unet.save_pretrained(snapshot / "unet")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub._snapshot_download.HF_HUB_CACHE", str(tmp_path), raising=False)
    net, params = UNet2DConditionModel.from_pretrained("someone/tiny-sd", "unet")
    assert_bit_equal(params, expected(unet, net))
    with pytest.raises(FileNotFoundError, match="someone/other"):
        UNet2DConditionModel.from_pretrained("someone/other", "unet")


def test_a_source_that_is_neither_folder_nor_hub_id_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a directory nor a hub id"):
        UNet2DConditionModel.from_pretrained(tmp_path / "nowhere", "unet")
    with pytest.raises(FileNotFoundError, match="has no folder 'unet'"):
        UNet2DConditionModel.from_pretrained(tmp_path, "unet")


# ---------------------------------------------------------------- broken files


@pytest.fixture
def folder(unet, tmp_path):
    unet.save_pretrained(tmp_path)
    return tmp_path


def change(folder, edit):
    """Rewrites the weights of a folder after `edit` changed their dict."""
    from safetensors.numpy import load_file, save_file

    path = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def test_missing_extra_and_misshapen_weights_are_named_in_one_error(folder):
    def edit(tensors):
        del tensors["conv_in.weight"]
        tensors["conv_in.wait"] = np.zeros(3, "float32")
        tensors["conv_out.bias"] = np.zeros(5, "float32")
        tensors["mid_block.resnets.0.conv1.weight"] = np.zeros((64, 64, 1, 1), "float32")

    change(folder, edit)
    with pytest.raises(ValueError) as error:
        UNet2DConditionModel.from_pretrained(folder)
    message = str(error.value)
    assert str(folder) in message
    for words in (
        "1 missing: conv_in.weight",
        "1 extra: conv_in.wait",
        "2 misshapen",
        "conv_out.bias has shape (5,), the config asks for (4,)",
        "mid_block.resnets.0.conv1.weight has shape (64, 64, 1, 1), the config asks for (64, 64, 3, 3)",
    ):
        assert words in message


def test_an_error_names_the_first_ten_offenders_and_counts_the_rest():
    names = [f"x{i:02d}" for i in reversed(range(25))]
    with pytest.raises(ValueError) as error:
        port.raise_for_mismatch("the file does not fit", missing=names, extra=[], unknown=["y"])
    listed = ", ".join(f"x{i:02d}" for i in range(10))
    assert str(error.value) == f"the file does not fit: 25 missing: {listed} and 15 more; 1 unknown: y"
    port.raise_for_mismatch("nothing is wrong", missing=[])


@pytest.mark.parametrize(
    "name,options",
    [
        ("diffusion_pytorch_model.safetensors", {}),
        ("diffusion_pytorch_model.bin", {"safe_serialization": False}),
    ],
)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_file_is_named(name, options, share, unet, tmp_path):
    unet.save_pretrained(tmp_path, **options)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match=f"{name}.*truncated"):
        UNet2DConditionModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_flax_file_or_stream_is_named(share, unet, torch, tmp_path):
    net = UNet2DConditionModel.from_config(dict(unet.config))
    net.save_pretrained(expected(unet, net), tmp_path, form="flax")
    stream = tmp_path / "diffusion_pytorch_model.bin"
    for path in (tmp_path / "diffusion_flax_model.msgpack", stream):
        if path == stream:
            torch.save(unet.state_dict(), stream, _use_new_zipfile_serialization=False)
        data = path.read_bytes()
        path.write_bytes(data[: int(share * len(data))])
        with pytest.raises(ValueError, match=f"{path.name}.*truncated"):
            UNet2DConditionModel.from_pretrained(tmp_path)


class _Malicious:
    def __reduce__(self):
        return (exec, ("raise SystemExit('the pickle ran')",))


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "stream"])
def test_a_pickle_that_asks_for_code_is_refused(legacy, folder, torch):
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    path = folder / "diffusion_pytorch_model.bin"
    torch.save({"conv_in.weight": torch.zeros(2), "x": _Malicious()}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"asks to run (builtins|__builtin__)\.exec"):
        UNet2DConditionModel.from_pretrained(folder)
    path.write_bytes(pickle.dumps(_Malicious()))
    with pytest.raises(ValueError, match=r"asks to run (builtins|__builtin__)\.exec"):
        UNet2DConditionModel.from_pretrained(folder)


def test_missing_files_are_named_with_a_remedy(folder):
    with pytest.raises(FileNotFoundError, match=r"no variant 'bf16' of weights.*diffusion_pytorch_model.safetensors"):
        UNet2DConditionModel.from_pretrained(folder, variant="bf16")
    path = folder / "diffusion_pytorch_model.safetensors"
    path.rename(folder / "diffusion_pytorch_model.fp16.safetensors")
    with pytest.raises(FileNotFoundError, match="variant='fp16'"):
        UNet2DConditionModel.from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        UNet2DConditionModel.from_pretrained(folder, variant="fp16")


def test_a_missing_shard_is_named(unet, tmp_path):
    unet.save_pretrained(tmp_path, max_shard_size="100KB")
    shard = sorted(tmp_path.glob("*-of-*"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"missing shards: {shard.name}"):
        UNet2DConditionModel.from_pretrained(tmp_path)


def test_another_class_or_broken_config_is_refused(folder):
    with pytest.raises(ValueError, match="describes UNet2DConditionModel, not AutoencoderKL"):
        AutoencoderKL.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"})[:-4])
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        UNet2DConditionModel.from_pretrained(folder)


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"layers_per_block": "2"}, r"layers_per_block='2' is not supported; use int"),
        ({"layers_per_block": [1, 1]}, r"layers_per_block=\[1, 1\] is not supported"),
        ({"norm_num_groups": 4.5}, r"norm_num_groups=4\.5 is not supported"),
        ({"norm_num_groups": -4}, r"norm_num_groups=-4 is not supported"),
        ({"use_linear_projection": 1}, r"use_linear_projection=1 is not supported; use bool"),
        ({"norm_eps": None}, r"norm_eps=None is not supported; use float"),
        ({"block_out_channels": 32}, r"block_out_channels=32 is not supported; use tuple\[int"),
        ({"block_out_channels": [], "down_block_types": [], "up_block_types": []}, "block_out_channels"),
        ({"attention_head_dim": [4]}, r"attention_head_dim=\[4\] must give the number of heads of each"),
        ({"attention_head_dim": 0}, "attention_head_dim"),
        ({"sample_size": [8]}, r"sample_size=\(8,\) is not supported; use one side, or two"),
        ({"sample_size": 0}, "sample_size=0"),
        ({"sample_size": "64"}, "sample_size='64'"),
    ],
    ids=str,
)
def test_a_config_value_of_another_type_is_named(changes, words):
    with pytest.raises(ValueError, match=rf"^config\.json: [^\n]*{words}[^\n]*$"):
        UNet2DConditionModel.from_config(UNET | changes)


# ---------------------------------------------------------------- files of another kind than their name says


def tensors_of(array):
    """Bytes of a safetensors file with one tensor of a UNet."""
    from safetensors.numpy import save

    return save({"conv_in.weight": array})


WRONG = {  # a file's bytes, or None for a directory
    "directory": None,
    "empty": b"",
    "git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0f1e\nsize 3438167540\n",
    "web page": b"<!DOCTYPE html>\n<html><body>404</body></html>\n",
    "text": b"a cat\n",
    "JSON list": b"[1, 2]\n",
    "image": b"\x89PNG\r\n\x1a\n" + bytes(40),
    "zip": b"PK\x05\x06" + bytes(18),
    "gzip": b"\x1f\x8b\x08" + bytes(40),
    "array of another rank": tensors_of(np.zeros((), np.float32)),
    "words": "ein Käfer\n".encode("latin-1"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A complete Stable Diffusion, a CLIP beside it, and files of Inception and LPIPS to break."""
    folder = tmp_path_factory.mktemp("whole")
    make_coco_models(folder)
    return folder


def load_sd(folder):
    return pipeline.load(str(folder / "sd"), variant=None, attention="xla")


def load_clip(folder):
    return clip_score.read_preprocessor(folder / "clip", "", CLIPModel.from_pretrained(folder / "clip")[0])


def in_other_form(name):
    """Reads the UNet from a file of that name in place of its safetensors."""

    def read(folder):
        (folder / "sd" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
        return UNet2DConditionModel.from_pretrained(folder / "sd", "unet")

    return f"sd/unet/{name}", read


READERS = {
    "unet weights": ("sd/unet/diffusion_pytorch_model.safetensors", load_sd),
    "bin weights": in_other_form("diffusion_pytorch_model.bin"),
    "flax weights": in_other_form("diffusion_flax_model.msgpack"),
    "shard index": in_other_form("diffusion_pytorch_model.safetensors.index.json"),
    "config": ("sd/unet/config.json", load_sd),
    "index": ("sd/model_index.json", load_sd),
    "scheduler": ("sd/scheduler/scheduler_config.json", load_sd),
    "vocabulary": ("sd/tokenizer/vocab.json", load_sd),
    "tokenizer config": ("sd/tokenizer/tokenizer_config.json", load_sd),
    "preprocessor": ("clip/preprocessor_config.json", load_clip),
    "clip config": ("clip/config.json", load_clip),
    "single file": ("x.safetensors", lambda f: pipeline.load(str(f / "x.safetensors"), **SINGLE, base=str(f / "sd"))),
    "ckpt": ("x.ckpt", lambda f: pipeline.load(str(f / "x.ckpt"), **SINGLE, base=str(f / "sd"))),
    "lora": ("x.safetensors", lambda f: lora.merge(load_sd(f).params, f / "x.safetensors", 1.0)),
    "inception": ("x.pth", lambda f: InceptionV3.from_file(f / "x.pth")),
    "lpips": ("x.pth", lambda f: LPIPS.from_files(f / "x.pth", f / "x.pth", net="alex")),
    "png": ("x.png", lambda f: images.load_png(f / "x.png")),
}
SINGLE = {"variant": None, "attention": "xla"}


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_a_file_of_another_kind_ends_in_one_line_that_names_it(reader, whole, tmp_path):
    name, read = READERS[reader]
    for kind, content in WRONG.items():
        folder = tmp_path / kind.replace(" ", "_")
        shutil.copytree(whole, folder)
        path = folder / name
        path.unlink(missing_ok=True)
        path.mkdir() if content is None else path.write_bytes(content)
        with pytest.raises((ValueError, OSError)) as error:
            read(folder)
        message = str(error.value)
        assert path.name in message or str(path.parent) in message, (kind, message)
        assert "\n" not in message and len(message) < 1000, (kind, message)
        shutil.rmtree(folder)


def test_an_array_that_holds_no_numbers_is_named(unet, tmp_path):
    from flax import serialization

    net = UNet2DConditionModel.from_config(dict(unet.config))
    net.save_pretrained(expected(unet, net), tmp_path, form="flax")
    path = tmp_path / "diffusion_flax_model.msgpack"
    tree = serialization.msgpack_restore(path.read_bytes())
    tree["conv_in"]["bias"] = "text"
    path.write_bytes(serialization.msgpack_serialize(tree))
    with pytest.raises(ValueError, match=r"msgpack does not fit .*: conv_in\.bias has the type <U4, not real numbers"):
        UNet2DConditionModel.from_pretrained(tmp_path)


def test_a_failed_write_leaves_the_old_file(folder, unet, monkeypatch):
    net, params = UNet2DConditionModel.from_pretrained(folder)
    import safetensors.numpy

    def disk_full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(safetensors.numpy, "save_file", disk_full)
    with pytest.raises(OSError, match="No space left"):
        net.save_pretrained({name: 0 * p for name, p in params.items()}, folder)
    assert_bit_equal(UNet2DConditionModel.from_pretrained(folder)[1], params)
    assert not list(folder.glob("*.tmp"))
