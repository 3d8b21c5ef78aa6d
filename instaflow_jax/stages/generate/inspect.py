"""Looking at pairs: the manifest, every checksum, and a grid of noise and image."""

import json
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from instaflow_jax import pipeline
from instaflow_jax.arrays import Params
from instaflow_jax.data.pairs import store as pairs_store
from instaflow_jax.data.pairs.reader import Pairs
from instaflow_jax.infra import images
from instaflow_jax.infra.files import sha256_of_params
from instaflow_jax.models.net import Net

PREVIEW = "preview.png"
_SIZE = 96  # pixels, about, of a picture in the grid


def run(directory: Path, count: int) -> None:
    """Prints the manifest, reads every byte of every shard, and draws `count` pairs.

    Raises:
      FileNotFoundError, ValueError: something is missing or damaged, or the teacher has another autoencoder now.
    """
    manifest = pairs_store.verify(directory)
    print(json.dumps({name: value for name, value in manifest.items() if name != "shards"}, indent=1))
    pairs = Pairs(directory)
    size = sum(note["bytes"] for note in manifest["shards"])
    print(
        f"{len(pairs)} pairs in {len(manifest['shards'])} shards, {size / 1e6:.1f} MB: every checksum agrees",
        flush=True,
    )
    rows = [pairs[number] for number in range(min(count, len(pairs)))]
    net, params = autoencoder(manifest)
    X0, X1 = (np.stack([row[name] for row in rows]) for name in ("X0", "X1"))
    draw(net, params, [row["prompt"] for row in rows], X0, X1, directory / PREVIEW)


def autoencoder(manifest) -> tuple[Net, Params]:
    """The one that the pairs were made for."""
    config = {"base": "", "delta": {"custom": ""}} | manifest["about"]["config"]  # manifests from before they existed
    model = config["delta"]["custom"] or config["model"]
    nets, weights = pipeline.networks(model, ["vae"], variant=config["weights_variant"] or None, base=config["base"])
    net, params = nets["vae"], weights["vae"]
    if sha256_of_params(params) != manifest["recipe"]["teacher"]["vae"]:
        raise ValueError(
            f"{model}/vae is not the autoencoder these pairs were made with: its weights have another hash"
        )
    return net, params


def draw(net: Net, params: Params, prompts: Sequence[str], X0, X1, path: Path) -> None:
    """A row a pair: the noise and the image, both decoded, with the prompt at the left."""
    latents = jnp.asarray(np.stack([X0, X1], axis=1).reshape(-1, *X0.shape[1:]), jnp.float32)
    decode = jax.jit(lambda params, Z: images.to_uint8(net.apply(params, Z, method="decode")))
    pictures = np.asarray(decode(params, latents))
    grid = images.grid(
        pictures,
        columns=2,
        row_labels=[text[:60] for text in prompts],
        column_labels=["noise", "image"],
        scale=max(1, _SIZE // pictures.shape[2]),
    )
    images.save_png(path, grid, {"prompts": "|".join(prompts)})
    print(f"drew {len(prompts)} pairs: {path}", flush=True)
