"""Builders and helpers that several test files share."""

import contextlib
import inspect
import io
import itertools
import json
import re
import runpy
import shlex
import shutil
import socket
import subprocess
import tarfile
from importlib import metadata
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags
from PIL import Image

from benchmarks.references import randomize, references, relative  # noqa: F401 (tests take them from here)
from instaflow_jax import pipeline
from instaflow_jax.data.openmoji import dataset as openmoji
from instaflow_jax.data.openmoji.captions import Emoji
from instaflow_jax.evals import features
from instaflow_jax.infra import files
from instaflow_jax.models.clip import CLIPModel, CLIPTextModel
from instaflow_jax.models.unet import UNet2DConditionModel
from instaflow_jax.models.vae import AutoencoderKL
from instaflow_jax.stages.export import web
from instaflow_jax.train import loop
from instaflow_jax.weights import port
from instaflow_jax.weights.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
TOKENIZER = Path(pipeline.EMBEDDED) / "openmoji" / "tokenizer"
UNET = {"norm_num_groups": 4, "sample_size": 8, "cross_attention_dim": 16}
# Three levels of two layers, attention where SD has it: everywhere but at the innermost.
DEEP = {
    "block_out_channels": (8, 16, 16),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2,
}
FLAT = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
KINDS = {  # the UNet and the text encoder's activation
    "sd1": (DEEP | {"attention_head_dim": 2}, "quick_gelu"),
    "sd2": (FLAT | {"attention_head_dim": [2, 4], "use_linear_projection": True}, "gelu"),
    "flat": (FLAT | {"attention_head_dim": 2}, "quick_gelu"),
}

PLAIN_PROMPTS = [
    "red apple",
    "Woman ASTRONAUT, dark skin tone",
    "",
    "  two   spaces\tand\nlines ",
    "it's we'll i'd",
    "a1b22 333",
    "café naïve",
    "what?!... (really)",
    "a photo-realistic fox",
    "#hash @at $5",
    "<|endoftext|>",
]
FAST_ONLY_PROMPTS = [
    "日本語",
    "👨‍👩‍👧 family",
    "ΟΔΟΣ",
]  # where OpenAI's tokenizer and the slow class's replacement for ftfy differ
LEARNED_PROMPTS = ["a <cat-toy>", "BLORP! x<cat-toy>y <CAT-TOY>", "wow! ! <|startoftext|> café"]


# ---------------------------------------------------------------- the reference libraries, of any version


def need_jax2onnx() -> None:
    """Skips a test where jax2onnx is not installed, or is 0.17, which fails with jax 0.12."""
    pytest.importorskip("jax2onnx", reason="jax2onnx is not installed")
    if jax.__version_info__ >= (0, 12) and metadata.version("jax2onnx").startswith("0.17."):
        pytest.skip("jax2onnx 0.17 does not work with jax 0.12")


def version(package: str) -> tuple[int, ...]:
    """The first two numbers of a package's version; (0, 0) where it is not installed."""
    try:
        return tuple(int(number) for number in re.findall(r"\d+", metadata.version(package))[:2])
    except metadata.PackageNotFoundError:
        return 0, 0


TRANSFORMERS_5 = version("transformers") >= (5, 0)
with_flax_classes = pytest.mark.skipif(
    TRANSFORMERS_5 or version("diffusers") >= (0, 40), reason="diffusers 0.40 and transformers 5 have no Flax classes"
)


def state_of(model) -> dict:
    """A torch model's state dict, its keys as in published files: `CLIPTextModel` lacks `text_model.` since
    transformers 5.6."""
    state = model.state_dict()
    bare = type(model).__name__ == "CLIPTextModel" and not hasattr(model, "text_model")
    return {f"text_model.{key}": tensor for key, tensor in state.items()} if bare else state


def projected(features):
    """What `get_text_features` and `get_image_features` compute; transformers 5 wraps it."""
    return getattr(features, "pooler_output", features)


def make_image_processor(**options):
    """transformers' CLIPImageProcessor on PIL; since transformers 5 the class of that name uses torchvision, which
    rounds differently."""
    import transformers

    return getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)(**options)


def save_tokenizer(theirs, folder: Path) -> None:
    """Writes transformers' fast tokenizer in all its files; transformers 5 itself writes `tokenizer.json` and a config
    without `added_tokens_decoder`."""
    theirs.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    if "added_tokens_decoder" in config:
        return
    whole = json.loads((folder / "tokenizer.json").read_text())
    vocab, merges, added = whole["model"]["vocab"], whole["model"]["merges"], whole["added_tokens"]
    config["added_tokens_decoder"] = {str(t["id"]): {k: t[k] for k in t if k != "id"} for t in added}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "added_tokens.json").write_text(
        json.dumps({t["content"]: t["id"] for t in added if t["id"] >= len(vocab)})
    )
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]))


def make_directory(folder: Path, kind: str, seed: int = 1, **options):
    """Writes the directory and returns diffusers' pipeline; `options` are the pipeline's own."""
    references()
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    unet, activation = KINDS[kind]
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            eos_token_id=tokenizer.eos_token_id,
            hidden_act=activation,
        )
    )
    widths = unet["block_out_channels"]
    vae = AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=unet["layers_per_block"],
        norm_num_groups=4,
        sample_size=32,
    )
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )
    filters = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe = StableDiffusionPipeline(
        vae=randomize(vae, seed),
        text_encoder=randomize(encoder, seed + 1),
        tokenizer=tokenizer,
        unet=randomize(UNet2DConditionModel(**UNET | unet), seed + 2),
        scheduler=scheduler,
        **filters | options,
    )
    pipe.save_pretrained(folder, safe_serialization=not options)
    return pipe


def make_random(folder: Path, vae: dict) -> Path:
    """A Stable Diffusion of random weights without PyTorch: 4×4 latents, one level but for this autoencoder's."""
    source, tokenizer = TOKENIZER.parent, Tokenizer.from_pretrained(TOKENIZER.parent)
    nets = {
        "unet": UNet2DConditionModel.from_config(
            {
                "sample_size": 4,
                "block_out_channels": (8,),
                "down_block_types": ("DownBlock2D",),
                "layers_per_block": 1,
                "up_block_types": ("UpBlock2D",),
                "cross_attention_dim": 8,
                "attention_head_dim": 2,
                "norm_num_groups": 4,
            }
        ),
        "vae": AutoencoderKL.from_config(vae),
        "text_encoder": CLIPTextModel.from_config(
            {
                "vocab_size": len(tokenizer.vocab),
                "hidden_size": 8,
                "intermediate_size": 8,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "max_position_embeddings": tokenizer.model_max_length,
                "eos_token_id": tokenizer.eos_id,
            }
        ),
    }
    index, scheduler = (
        json.loads((source / name).read_text()) for name in ("model_index.json", "scheduler/scheduler_config.json")
    )
    params = {name: jax.device_get(net.init(jax.random.key(i))) for i, (name, net) in enumerate(nets.items())}
    pipeline.save(pipeline.Pipeline(nets, params, tokenizer, scheduler, index), folder)
    return folder


def load(source, **options) -> pipeline.Pipeline:
    return pipeline.load(str(source), variant=None, attention="xla", **options)


def torch_names(params) -> dict[str, np.ndarray]:
    """Our parameters as a PyTorch state dict."""
    return {port.torch_key(name): port.to_torch(name, value) for name, value in params.items()}


def assert_is(params, torch_pipe):
    """Every weight equals PyTorch's, to the bit."""
    for name in ("unet", "vae", "text_encoder"):
        want = {k: v.numpy() for k, v in state_of(getattr(torch_pipe, name)).items() if "position_ids" not in k}
        got = torch_names(params[name])
        assert got.keys() == want.keys()
        for key, value in want.items():
            np.testing.assert_array_equal(got[key], value, err_msg=key)


def onnxruntime_web() -> Path:
    """The unpacked npm package onnxruntime-web, fetched once and kept; skips the test where npm cannot fetch it."""
    folder = files.user_cache() / f"onnxruntime-web-{web.ORT_VERSION}"
    if not folder.is_dir():
        if shutil.which("npm") is None:
            pytest.skip("no npm on this machine to fetch onnxruntime-web with")
        with files.atomic_directory(folder) as directory:
            command = ["npm", "pack", "--silent", f"onnxruntime-web@{web.ORT_VERSION}"]
            done = subprocess.run(command, cwd=directory, check=False, capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"npm could not fetch onnxruntime-web: {done.stderr[-200:]}")
            with tarfile.open(next(directory.glob("*.tgz"))) as archive:
                archive.extractall(directory, filter="data")
    return folder / "package"


# ---------------------------------------------------------------- tiny models for the stages


def make_small_teacher(folder: Path) -> Path:
    """A Stable Diffusion of random weights with one level each: 4×4 latents and pixels."""
    return make_random(
        folder,
        {
            "block_out_channels": (8,),
            "down_block_types": ("DownEncoderBlock2D",),
            "norm_num_groups": 4,
            "up_block_types": ("UpDecoderBlock2D",),
            "sample_size": 4,
        },
    )


def make_tiny(folder: Path) -> Path:
    """A Stable Diffusion of random weights: 32×32 pixels as the embedded CLIP takes them, 4×4 latents."""
    return make_random(
        folder,
        {
            "block_out_channels": (4,) * 4,
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "norm_num_groups": 2,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "layers_per_block": 1,
            "sample_size": 32,
        },
    )


EMOJI_NAMES = (
    "red apple",
    "cat face",
    "house",
    "astronaut",
    "rocket",
    "octopus",
    "grinning face",
    "flag of japan",
    "bee",
    "green apple",
    "dog face",
    "castle",
    "robot",
    "ship",
    "whale",
    "crying face",
    "flag of france",
    "ant",
)


def make_emoji() -> openmoji.Arrays:
    """Smooth images in place of emoji, so that no test waits for drawing."""
    coarse = np.random.default_rng(0).integers(0, 255, (len(EMOJI_NAMES), 4, 4, 3)).astype(np.uint8)
    words = [Emoji(f"{i:X}", name, "objects", "tool", "", "", name) for i, name in enumerate(EMOJI_NAMES)]
    return openmoji.Arrays(coarse.repeat(8, 1).repeat(8, 2), words)


# ---------------------------------------------------------------- shipped configs with small numbers


SMALL_LOOP = {"steps": 4, "log_every": 1, "save_every": 2}
SMALL_PAIRS = {"count": 8, "shard_size": 8, "batch": 4, "N": 2, "preview": 1}


def read_config(stage: str, variant: str = "") -> ConfigDict:
    """The config that `configs/{stage}.py`, or a variant of it, gives."""
    return runpy.run_path(str(ROOT / "configs" / f"{stage}.py"))["get_config"](*([variant] if variant else []))


def shrink_training(config, teacher):
    """The shipped config with small numbers."""
    config.update({"batch_size": 4, "eval_every": 4, "tensorboard": False})
    config.loop.update({name: value for name, value in SMALL_LOOP.items() if name in config.loop})
    config.eval.update({"prompts": ("red apple",), "seeds": 1, "N": (1,)})
    config.schedule.update({"warmup_steps": 1})
    config.pairs.update(SMALL_PAIRS)
    if config.pairs.model:
        config.pairs.model = str(teacher)
    if "later" in config:
        config.later.update({"pairs": SMALL_PAIRS, "loop": {"steps": SMALL_LOOP["steps"]}})
    return config


def reflow_config(teacher):
    config = shrink_training(read_config("reflow"), teacher)
    config.model = str(teacher)
    return config


def distill_config(teacher, variant="openmoji"):
    config = shrink_training(read_config("distill", variant), teacher)
    with config.unlocked():
        config.reflow = reflow_config(teacher)
    if variant == "direct":
        config.model = str(teacher)
    return config


def refine_config(teacher):
    """Every term of the losses, and one step in which the student waits."""
    config = shrink_training(read_config("refine"), teacher)
    config.update({"regression": 0.25, "adversarial": 0.1, "N": (1, 2)})
    config.fake.update({"updates": 1, "first": 1, "adversarial": 0.1})
    for flow in (config.score, config.reflow):
        shrink_training(flow, teacher).model = str(teacher)
    with config.unlocked():  # the teacher's pairs, and a score that is trained on them
        config.update({"real": "", "pairs_folder": ""})
        config.pairs = config.score.pairs
    return config


def control_config(teacher):
    config = shrink_training(read_config("control"), teacher)
    shrink_training(config.reflow, teacher).model = str(teacher)
    config.channels, config.eval.N = (8,), (1,)
    return config


def progressive_config(teacher):
    config = shrink_training(read_config("progressive"), teacher)
    config.model, config.rounds = str(teacher), {"N": (2, 1), "steps": (4, 4)}
    return config


def shrink_evaluate(config, tiny):
    """The shipped config with small numbers."""
    config.update({"count": 8, "batch": 4, "repeats": 1})
    config.teacher.update({"model": str(tiny), "N": (3, 1)})
    config.reflow.N, config.distill.N = (2, 1), (1,)
    config.straightness.update({"N": 3, "count": 4})
    config.guidance.update({"N": 2, "alphas": (1.0, 2.0)})
    config.show.update({"prompts": ("red apple", "house"), "points": 3})
    return config


def shrink_demo(config, tiny):
    """The shipped config with small numbers."""
    for name in ("reflow", "distill", "direct", "reflow_3", "lpips", "refine", "stacked", "progressive"):
        if name in config:
            shrink_training(config[name], tiny).loop.update(
                {"save_every": 2} | ({"steps": 2} if "steps" in config[name].loop else {})
            )
    for name in ("reflow", "direct", "reflow_3", "progressive"):
        if name in config:
            config[name].model = str(tiny)
    if "refine" in config:
        config.refine.real = str(tiny)
    shrink_evaluate(config.evaluate, tiny)
    return config


def pretrain_config(variant: str):
    """The example config with a few numbers made small."""
    config = read_config("pretrain", variant)
    config.batch_size, config.eval_every, config.loop.steps, config.loop.log_every = 8, 100, 12, 1
    config.schedule.update({"warmup_steps": 1, "peak": 3e-3})
    if variant == "autoencoder":
        config.model.block_out_channels = (8, 8, 8)
    if variant == "diffusion":
        config.copies = 1
        config.unet.update(
            {
                "block_out_channels": (16,),
                "attention_head_dim": (1,),
                "sample_size": 8,
                "down_block_types": ("CrossAttnDownBlock2D",),
                "up_block_types": ("CrossAttnUpBlock2D",),
            }
        )
        config.text_encoder.num_hidden_layers = 1
        config.eval.update({"prompts": config.eval.prompts[:2], "seeds": 2, "N": 2})
    if variant == "classifier":
        config.model.widths, config.schedule.peak = (8, 8, 8, 8), 1e-2
    if variant == "clip":
        config.model.text_config.num_hidden_layers = config.model.vision_config.num_hidden_layers = 1
    return config


# ---------------------------------------------------------------- COCO


COCO_COUNT = 14


COCO_IDS = [int(i) for i in np.random.default_rng(0).choice(500000, COCO_COUNT, replace=False)]


COCO_WORDS = ("red apple", "house", "cat face", "woman astronaut")


def jpeg(seed: int) -> bytes:
    """A photograph of its own size; every fifth is grey."""
    random = np.random.default_rng(seed)
    height, width = random.integers(20, 40, 2)
    pixels = random.integers(0, 255, (3, 4) if seed % 5 == 0 else (3, 4, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((int(width), int(height))).save(file, "JPEG", quality=95)
    return file.getvalue()


def captions_of(i: int) -> list[str]:
    return [f"{COCO_WORDS[i % 4]} number {i} \n", "another caption"]


def make_coco(root: Path) -> Path:
    """The official files: val/*.jpg and annotations/captions_val.json."""
    (root / "val").mkdir()
    (root / "annotations").mkdir()
    for i, number in enumerate(COCO_IDS):
        (root / "val" / f"{number:012d}.jpg").write_bytes(jpeg(i))
    annotations = [
        {"image_id": number, "id": 100 * k + i, "caption": captions_of(i)[k]}
        for k in (0, 1)
        for i, number in enumerate(COCO_IDS)
    ]
    names = [{"id": number, "file_name": f"{number:012d}.jpg", "height": 1, "width": 1} for number in COCO_IDS]
    (root / "annotations" / "captions_val.json").write_text(json.dumps({"images": names, "annotations": annotations}))
    return root


def drawn(net) -> dict[str, np.ndarray]:
    """Random weights without the compilation that `net.init` takes: scales and variances 1, biases 0."""
    random = np.random.default_rng(0)
    return {
        name: np.ones(p.shape)
        if name.endswith(("scale", "var"))
        else np.zeros(p.shape)
        if p.ndim == 1
        else random.normal(size=p.shape) * (2 / max(np.prod(p.shape[:-1]), 1)) ** 0.5
        for name, p in net.shapes.items()
    }


def make_coco_models(root: Path) -> Path:
    """A Stable Diffusion and a CLIP of random weights, 16 pixels."""
    tokenizer = Tokenizer.from_pretrained(pipeline.locate("openmoji"))
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = tower | {"vocab_size": 2048, "max_position_embeddings": 16, "eos_token_id": 2047}
    nets = {
        "unet": UNet2DConditionModel.from_config(
            {
                "block_out_channels": (16,),
                "layers_per_block": 1,
                "cross_attention_dim": 16,
                "attention_head_dim": 2,
                "down_block_types": ("CrossAttnDownBlock2D",),
                "up_block_types": ("CrossAttnUpBlock2D",),
                "norm_num_groups": 4,
                "sample_size": 8,
            }
        ),
        "vae": AutoencoderKL.from_config(
            {
                "block_out_channels": (16, 16),
                "down_block_types": ("DownEncoderBlock2D",) * 2,
                "norm_num_groups": 4,
                "up_block_types": ("UpDecoderBlock2D",) * 2,
                "layers_per_block": 1,
                "sample_size": 16,
            }
        ),
        "text_encoder": CLIPTextModel.from_config(text),
    }
    params = {name: drawn(net) for name, net in nets.items()}
    index = json.loads((Path(pipeline.locate("openmoji")) / "model_index.json").read_text())
    scheduler = {
        "_class_name": "PNDMScheduler",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "num_train_timesteps": 1000,
    }
    pipeline.save(pipeline.Pipeline(nets, params, tokenizer, scheduler, index), root / "sd")
    clip = CLIPModel.from_config(
        {"text_config": text, "vision_config": tower | {"image_size": 16, "patch_size": 8}, "projection_dim": 8}
    )
    clip.save_pretrained(drawn(clip), root / "clip", dtype=np.float32)
    plain = {"size": {"height": 16, "width": 16}, "do_center_crop": False}
    plain |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (root / "clip" / "preprocessor_config.json").write_text(json.dumps(plain))
    tokenizer.save_pretrained(root / "clip")
    return root


def small_inception(path) -> features.FeatureNet:
    """A small network in place of Inception: six numbers per image."""
    features.check_inception(path)
    weights = np.random.default_rng(0).normal(size=(4, 4, 3, 6)).astype(np.float32)

    def look(w, x):
        step = x.shape[1] // 4
        return (x[:, ::step, ::step] / 255).reshape(len(x), -1) @ w.reshape(-1, 6)

    return look, weights


# ---------------------------------------------------------------- single files in the original naming


def unet_modules(config):
    """diffusers' name of each module → CompVis', by walking through `UNetModel.__init__` and counting."""
    levels, layers = len(config.block_out_channels), config.layers_per_block
    names = {
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }
    count = 1
    for level in range(levels):
        for layer in range(layers):
            names[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{count}.0"
            if "CrossAttn" in config.down_block_types[level]:
                names[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{count}.1"
            count += 1
        if level != levels - 1:
            names[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{count}.0.op"
            count += 1
    count = 0
    for level in range(levels):
        for layer in range(layers + 1):
            inside = [f"up_blocks.{level}.resnets.{layer}"]
            if "CrossAttn" in config.up_block_types[level]:
                inside.append(f"up_blocks.{level}.attentions.{layer}")
            if level != levels - 1 and layer == layers:
                inside.append(f"up_blocks.{level}.upsamplers.0")
            names |= {module: f"output_blocks.{count}.{i}" for i, module in enumerate(inside)}
            count += 1
    return names


def vae_modules(config):
    """The same for the autoencoder; the decoder's levels are made from the last to the first."""
    levels, layers, names = len(config.block_out_channels), config.layers_per_block, {}
    for half in ("encoder", "decoder"):
        names |= {
            f"{half}.conv_in": f"{half}.conv_in",
            f"{half}.conv_norm_out": f"{half}.norm_out",
            f"{half}.conv_out": f"{half}.conv_out",
            f"{half}.mid_block.resnets.0": f"{half}.mid.block_1",
            f"{half}.mid_block.attentions.0": f"{half}.mid.attn_1",
            f"{half}.mid_block.resnets.1": f"{half}.mid.block_2",
        }
    for level in range(levels):
        names |= {f"encoder.down_blocks.{level}.resnets.{j}": f"encoder.down.{level}.block.{j}" for j in range(layers)}
        names[f"encoder.down_blocks.{level}.downsamplers.0.conv"] = f"encoder.down.{level}.downsample.conv"
    for ours, level in enumerate(reversed(range(levels))):
        names |= {f"decoder.up_blocks.{ours}.resnets.{j}": f"decoder.up.{level}.block.{j}" for j in range(layers + 1)}
        names[f"decoder.up_blocks.{ours}.upsamplers.0.conv"] = f"decoder.up.{level}.upsample.conv"
    return names | {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}


UNET_PARTS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


VAE_PARTS = {
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def rename(state, modules, parts, prefix):
    renamed = {}
    for key, tensor in state.items():
        module = max((m for m in modules if key.startswith(m + ".")), key=len)
        layer, _, word = key[len(module) + 1 :].rpartition(".")
        renamed[".".join(filter(None, (prefix, modules[module], parts.get(layer, layer), word)))] = tensor
    return renamed


def to_ldm(pipe, kind):
    """The whole state dict of a CompVis checkpoint, with all that such files carry besides."""
    import torch

    state = rename(pipe.unet.state_dict(), unet_modules(pipe.unet.config), UNET_PARTS, "model.diffusion_model")
    vae = rename(pipe.vae.state_dict(), vae_modules(pipe.vae.config), VAE_PARTS, "first_stage_model")
    state |= {k: v[..., None, None] if "attn_1" in k and v.ndim == 2 else v for k, v in vae.items()}
    text = state_of(pipe.text_encoder)
    state |= {f"cond_stage_model.transformer.{k}": v for k, v in text.items()} if kind == "sd1" else to_openclip(text)
    if kind == "sd1":
        state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(16)[None]
    state |= {
        "betas": torch.ones(1000),
        "alphas_cumprod": torch.ones(1000),
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.diffusion_modelinput_blocks00weight": torch.zeros(8, 4, 3, 3),
    }
    return {key: tensor.clone().contiguous() for key, tensor in state.items()}


def to_openclip(text):
    import torch

    prefix, state = "cond_stage_model.model.", {}
    state["positional_embedding"] = text["text_model.embeddings.position_embedding.weight"]
    state["token_embedding.weight"] = text["text_model.embeddings.token_embedding.weight"]
    for word in ("weight", "bias"):
        state[f"ln_final.{word}"] = text[f"text_model.final_layer_norm.{word}"]
        for i in range(2):
            layer, block = f"text_model.encoder.layers.{i}", f"transformer.resblocks.{i}"
            state[f"{block}.attn.in_proj_{word}"] = torch.cat(
                [text[f"{layer}.self_attn.{x}_proj.{word}"] for x in "qkv"]
            )
            for theirs, ours in (
                ("attn.out_proj", "self_attn.out_proj"),
                ("ln_1", "layer_norm1"),
                ("ln_2", "layer_norm2"),
                ("mlp.c_fc", "mlp.fc1"),
                ("mlp.c_proj", "mlp.fc2"),
            ):
                state[f"{block}.{theirs}.{word}"] = text[f"{layer}.{ours}.{word}"]
    state |= {"text_projection": torch.eye(16), "logit_scale": torch.tensor(4.6)}
    return {prefix + key: tensor for key, tensor in state.items()}


# ---------------------------------------------------------------- commands in README and docs/


DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").glob("*.md")
)
TEXT = "\n".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)


FENCES = re.findall(r"```(\w+)\n(.*?)```", TEXT, re.DOTALL)


MAIN = ["python", "-m", "instaflow_jax.main"]


def commands_of(text: str, begin: list[str]) -> list[list[str]]:
    """Words of the commands in a shell block that begin so, comments cut off."""
    lines = [shlex.split(line, comments=True) for line in text.replace("\\\n", " ").splitlines()]
    return [words for words in lines if words[: len(begin)] == begin]


def commands(*begin: str) -> list[list[str]]:
    """Words of the commands that begin so, in shell blocks and in running text, each once."""
    text = "\n".join(
        [text for language, text in FENCES if language == "bash"] + re.findall(r"`(python -m [^`\n]+)`", TEXT)
    )
    return [list(words) for words in dict.fromkeys(tuple(words) for words in commands_of(text, list(begin)))]


def parse(words: list[str], monkeypatch):
    """The config that a command line gives, read as `main` reads it."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr("sys.argv", ["main", *words[len(MAIN) :]])
    values = flags.FlagValues()
    config = config_flags.DEFINE_config_file("config", flag_values=values)
    for name in ("workdir", "coordinator"):
        flags.DEFINE_string(name, "", "", flag_values=values)
    for name in ("cpu_devices", "processes", "process"):
        flags.DEFINE_integer(name, 0, "", flag_values=values)
    values(["main", *words[len(MAIN) :]])
    return config.value


# ---------------------------------------------------------------- this machine


class Killed(BaseException):
    """Stands for SIGKILL inside a test's own process."""


@contextlib.contextmanager
def killed_at(number: int):
    """Ends what runs inside with `Killed` at a training step, counted over all trainings, before it is saved."""
    count, add = itertools.count(1), loop.MetricsLog.add

    def add_or_die(self, step, metrics):
        if next(count) == number:
            raise Killed
        add(self, step, metrics)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.MetricsLog, "add", add_or_die)
        with pytest.raises(Killed):
            yield


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def normal(seed: int, *shape: int) -> np.ndarray:
    """Standard normal float32 numbers, the same for torch and JAX."""
    return np.asarray(jax.random.normal(jax.random.key(seed), shape), np.float32)


def unchecked(function):
    """The function without the run-time type checker, for tests of what it does with a wrong type."""
    return inspect.unwrap(function)


def flip(path: Path) -> None:
    """Flips one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
