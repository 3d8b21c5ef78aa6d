"""The embedded autoencoder: 32×32 pixels ⇄ 8×8×8 latents."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from instaflow_jax.data.openmoji.augment import turn
from instaflow_jax.infra import images
from instaflow_jax.models.vae import AutoencoderKL
from instaflow_jax.stages.pretrain import losses as pretraining
from instaflow_jax.stages.pretrain.losses import Augment
from instaflow_jax.stages.pretrain.recipe import Recipe, in_batches, load, make_augment, to_pixels

_SHOWN = 64  # held-out emoji in the grid


def make(config: ConfigDict, workdir: str) -> Recipe:
    """Trained on the split "train" alone; watched on "heldout"."""
    net = AutoencoderKL.from_config(config.model.to_dict())
    known, held_out = (load(config, workdir, split).images for split in ("train", "heldout"))
    encode = jax.jit(lambda params, x: net.apply(params, x, method="encode"))
    decode = jax.jit(lambda params, z: net.apply(params, z, method="decode"))

    def watch(params, path: Path) -> dict[str, float]:
        pixels = to_pixels(held_out)
        made = in_batches(lambda x: decode(params, encode(params, x)), 62, pixels).clip(-1, 1)
        pictures = np.stack([pixels[:_SHOWN], made[:_SHOWN]], 1).reshape(-1, *pixels.shape[1:])
        grid = images.grid(images.to_uint8(pictures), columns=16, row_labels=(), column_labels=(), scale=2)
        images.save_png(path, grid, {"shows": "held-out emoji, each beside its reconstruction"})
        mse = np.mean((made - pixels) ** 2, (1, 2, 3))
        return {
            "heldout_psnr": float(np.mean(10 * np.log10(4 / mse))),
            "heldout_psnr_of_mean": float(10 * np.log10(4 / mse.mean())),
        }

    def export(params, directory: Path) -> None:
        """Latents are to have unit variance: the factor is measured on all training pictures."""
        latents = in_batches(lambda x: encode(params, x), 62, to_pixels(known)) / net.config.scaling_factor
        raw = net.raw_config | {"scaling_factor": round(float(1 / latents.std()), 5)}
        dataclasses.replace(net, raw_config=raw).save_pretrained(params, directory / "vae", dtype=np.float16)

    loss = pretraining.make_autoencoder_loss(net, make_turned(config), **config.loss)
    return Recipe(net.init, loss, {"image": known}, watch, export)


def make_turned(config: ConfigDict) -> Augment:
    """Moved, scaled and turned: 3,600 emoji are few, and an autoencoder is to know shapes and edges of any kind."""
    move = make_augment(config)

    def change(key, pixels):
        move_key, turn_key = jax.random.split(key)
        return turn(turn_key, move(move_key, pixels))

    return change
