"""The embedded autoencoder: 32×32 pixels ⇄ 8×8×8 latents."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from instaflow_jax.arrays import Params
from instaflow_jax.data.openmoji.augment import turn
from instaflow_jax.infra import images
from instaflow_jax.infra.runner import BatchedRunner
from instaflow_jax.models.vae import AutoencoderKL
from instaflow_jax.stages.pretrain.losses import Augment, make_autoencoder_loss
from instaflow_jax.stages.pretrain.recipe import LoadSplit, Recipe

_PER_DEVICE = 62  # images of a device and call
_SHOWN = 64  # held-out emoji in the grid


def make(load: LoadSplit, augment: Augment, *, model: Mapping[str, Any], loss: Mapping[str, float]) -> Recipe:
    """Trains on the split "train" and evaluates on "heldout".

    Args:
      model: the network's `config.json`.
      loss: keywords of `make_autoencoder_loss`.
    """
    net = AutoencoderKL.from_config(model)
    known, held_out = load("train").images, images.to_pixels(load("heldout").images)
    encode = BatchedRunner(lambda params, x: net.apply(params, x, method="encode"), _PER_DEVICE)
    decode = BatchedRunner(lambda params, z: net.apply(params, z, method="decode"), _PER_DEVICE)

    def evaluate(params: Params, path: Path) -> dict[str, float]:
        decoded = decode(params, encode(params, held_out)).clip(-1, 1)
        shown = np.stack([held_out[:_SHOWN], decoded[:_SHOWN]], 1).reshape(-1, *held_out.shape[1:])
        grid = images.grid(images.to_uint8(shown), columns=16, row_labels=(), column_labels=(), scale=2)
        images.save_png(path, grid, {"shows": "held-out emoji, each beside its reconstruction"})
        mse = np.mean((decoded - held_out) ** 2, (1, 2, 3))
        return {
            "heldout_psnr": float(np.mean(10 * np.log10(4 / mse))),
            "heldout_psnr_of_mean": float(10 * np.log10(4 / mse.mean())),
        }

    def export(params: Params, directory: Path) -> None:
        """Sets the scaling factor so that the latents of all training images have unit variance."""
        latents = encode(params, images.to_pixels(known)) / net.config.scaling_factor
        raw = net.raw_config | {"scaling_factor": round(float(1 / latents.std()), 5)}
        dataclasses.replace(net, raw_config=raw).save_pretrained(params, directory / "vae", dtype=np.float16)

    return Recipe(net.init, make_autoencoder_loss(net, and_turn(augment), **loss), {"image": known}, evaluate, export)


def and_turn(augment: Augment) -> Augment:
    """`augment`, then turned and recoloured: 3,600 emoji are few, and an autoencoder has to learn shapes in general."""

    def change(key, pixels):
        move_key, turn_key = jax.random.split(key)
        return turn(turn_key, augment(move_key, pixels))

    return change
