"""Checking pairs: the manifest, every checksum, and a grid of noise and image."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float16

from instaflow_jax import pipeline, sampling
from instaflow_jax.arrays import Params
from instaflow_jax.data.pairs import store as pairs_store
from instaflow_jax.data.pairs.reader import Pairs
from instaflow_jax.infra import images
from instaflow_jax.infra.files import sha256_of_params
from instaflow_jax.models.net import Net
from instaflow_jax.stages.common.loading import check_drawn, name_image

PREVIEW = "preview.png"
_SIZE = 96  # approximate size of an image in the grid, pixels


def run(directory: Path, count: int) -> None:
    """Prints the manifest, reads every byte of every shard, and draws `count` pairs.

    Raises:
      FileNotFoundError, ValueError: something is missing or damaged, or the teacher's autoencoder has changed.
    """
    manifest = pairs_store.verify(directory)
    print(json.dumps({name: value for name, value in manifest.items() if name != "shards"}, indent=1))
    pairs, shards = Pairs(directory), manifest["shards"]
    size = sum(shard["bytes"] for shard in shards) / 1e6
    print(f"{len(pairs)} pairs in {len(shards)} shards, {size:.1f} MB: all checksums match", flush=True)
    rows = [pairs[number] for number in range(min(count, len(pairs)))]
    net, params = load_autoencoder(manifest)
    X0, X1 = (np.stack([row[name] for row in rows]) for name in ("X0", "X1"))
    draw(net, params, [row["prompt"] for row in rows], X0, X1, directory / PREVIEW)


def load_autoencoder(manifest: Mapping[str, Any]) -> tuple[Net, Params]:
    """The autoencoder that the pairs were made for. Raises ValueError if its weights have changed since."""
    config = {"base": "", "delta": {"custom": ""}} | manifest["about"]["config"]  # older manifests lack these fields
    model = config["delta"]["custom"] or config["model"]
    classes = {"vae": pipeline.NETWORKS["vae"]}
    nets, params = pipeline.networks(model, classes, variant=config["weights_variant"] or None, base=config["base"])
    if sha256_of_params(params["vae"]) != manifest["recipe"]["teacher"]["vae"]:
        raise ValueError(
            f"{model}/vae is not the autoencoder these pairs were made with: its weights have another hash; "
            "restore the original weights"
        )
    return nets["vae"], params["vae"]


def draw(
    net: Net,
    params: Params,
    prompts: Sequence[str],
    X0: Float16[np.ndarray, "B h w c"],
    X1: Float16[np.ndarray, "B h w c"],
    path: Path,
) -> None:
    """One row per pair: noise and image, both decoded, with the prompt at the left."""
    latents = jnp.asarray(np.stack([X0, X1], axis=1).reshape(-1, *X0.shape[1:]), jnp.float32)
    decode = jax.jit(lambda params, Z: sampling.to_uint8_checked(net.apply(params, Z, method="decode")))
    decoded, finite = decode(params, latents)
    check_drawn(np.asarray(finite), [name_image(text, kind) for text in prompts for kind in ("of X0", "of X1")])
    grid = images.grid(
        np.asarray(decoded),
        columns=2,
        row_labels=[text[:60] for text in prompts],
        column_labels=["noise", "image"],
        scale=max(1, _SIZE // decoded.shape[2]),
    )
    images.save_png(path, grid, {"prompts": "|".join(prompts)})
    print(f"drew {len(prompts)} pairs: {path}", flush=True)
