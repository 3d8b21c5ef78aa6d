"""The networks that are measured: SD 1.5's, and tiny ones for dry runs and tests."""

import dataclasses
from typing import Any

from instaflow_jax.stages.plan.shapes import SD15

Configs = dict[str, dict[str, Any]]
TINY: Configs = {
    "unet": {
        "sample_size": 8,
        "block_out_channels": (32, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
    },
    "vae": {
        "block_out_channels": (32,),
        "down_block_types": ("DownEncoderBlock2D",),
        "up_block_types": ("UpDecoderBlock2D",),
        "layers_per_block": 1,
        "sample_size": 8,
    },
    "text_encoder": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "vocab_size": 64,
        "max_position_embeddings": 5,
        "eos_token_id": 63,
    },
    "lpips": {"net": "vgg", "widths": (4, 8), "depths": (1, 1)},
}


@dataclasses.dataclass(frozen=True)
class Size:
    """What the GPU suite and the drill measure.

    Attributes:
      flops: of each network's forward pass at batch 1.
      latent: height and width of the latents.
      batches: of the one-step image.
      steps: solver steps of the guided teacher.
      training: (loss, remat, batch) of each training step.
      crop, margin: latents per side that LPIPS compares, and around it.
      telling: groups of the GPU suite that the drill measures first.
      repeats: timed runs of everything.
      compiled: whether PyTorch compiles.
    """

    configs: Configs
    flops: dict[str, float]
    latent: int
    device: str
    dtype: str
    batches: tuple[int, ...]
    steps: int
    training: tuple[tuple[str, str, int], ...]
    crop: int
    margin: int
    telling: tuple[str, ...]
    repeats: int
    compiled: bool


CARD = Size(
    configs=SD15,
    flops={"unet": 0.803e12, "vae": 2.51e12, "text_encoder": 0.013e12},  # 64×64 latents, 77 tokens
    latent=64,
    device="cuda",
    dtype="bfloat16",
    batches=(1, 2, 4, 8, 16),
    steps=25,
    training=(
        ("reflow", "none", 8),
        ("reflow", "blocks", 8),
        ("reflow", "blocks", 32),
        ("LPIPS", "none", 4),
        ("LPIPS", "blocks", 4),
        ("LPIPS", "blocks", 16),
    ),
    crop=32,
    margin=2,
    telling=(
        "one-step image, batch 1",
        "25 guided teacher steps",
        "reflow step, remat none, batch 8",
        "LPIPS step, remat blocks, batch 4",
        "one-step image, batch 16",
    ),
    repeats=5,
    compiled=True,
)
DRY = Size(
    configs=TINY,
    flops=dict.fromkeys(CARD.flops, 1e6),
    latent=8,
    device="cpu",
    dtype="float32",
    batches=(2,),
    steps=2,
    training=(("reflow", "none", 2),),
    crop=4,
    margin=1,
    telling=("one-step image, batch 2", "reflow step, remat none, batch 2"),
    repeats=1,
    compiled=False,
)
