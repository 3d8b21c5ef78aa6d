"""A whole Stable Diffusion of random weights and few channels, written by PyTorch diffusers or by ourselves."""

import json
from pathlib import Path

import jax
import numpy as np
from conftest import randomize, references

from instaflow_jax import pipeline
from instaflow_jax.models.clip import CLIPTextModel
from instaflow_jax.models.unet import UNet2DConditionModel
from instaflow_jax.models.vae import AutoencoderKL
from instaflow_jax.weights import port
from instaflow_jax.weights.tokenizer import Tokenizer

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
        want = {k: v.numpy() for k, v in getattr(torch_pipe, name).state_dict().items() if "position_ids" not in k}
        got = torch_names(params[name])
        assert got.keys() == want.keys()
        for key, value in want.items():
            np.testing.assert_array_equal(got[key], value, err_msg=key)
