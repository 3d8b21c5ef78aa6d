"""Real images as training data: the block `config.images`, and their latents in `workdir`/images, encoded once."""

import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from instaflow_jax import __version__, pipeline
from instaflow_jax.arrays import Params
from instaflow_jax.data.noise import NAME, noise
from instaflow_jax.data.pairs import manifest, store
from instaflow_jax.data.pairs.reader import Shards
from instaflow_jax.data.real_images import sources
from instaflow_jax.data.real_images.sources import RealImage
from instaflow_jax.infra import devices
from instaflow_jax.infra.files import sha256_of_params
from instaflow_jax.infra.images import to_pixels
from instaflow_jax.infra.messages import first_ten
from instaflow_jax.infra.progress import Progress
from instaflow_jax.infra.runner import BatchedRunner
from instaflow_jax.models.net import Net
from instaflow_jax.models.vae import AutoencoderKL
from instaflow_jax.stages.common.loading import (
    WeightOptions,
    network_options,
    sha256_of_tokenizer,
    tokenize_quietly,
)
from instaflow_jax.weights.tokenizer import Tokenizer

FOLDER = "images"  # of the workdir
SHARD_SIZE = 256  # images per file; a kill loses at most one file


def read_share(config: ConfigDict, batch_size: int) -> int:
    """The rows of a batch that are real images by `config.images`; 0 without a source.

    Raises:
      ValueError: the share of a batch is less than one image.
    """
    rows = round(config.share * batch_size) if config.source else 0
    if config.source and config.share and not rows:
        raise ValueError(
            f"config.images.share={config.share:g} of a batch of {batch_size} is less than one image: use at least "
            f"{1 / batch_size:.3g}, or config.images.source=''"
        )
    return rows


@dataclasses.dataclass(frozen=True)
class Job:
    """What encodes the images.

    Attributes:
      images: all of them, in the order of their numbers.
      vae, params: the autoencoder.
      tokenizer: of the captions.
      recipe: everything that decides the bytes of their latents, as JSON.
      batch: images per device and call.
    """

    images: Sequence[RealImage]
    vae: Net
    params: Params
    tokenizer: Tokenizer
    recipe: Mapping[str, Any]
    batch: int


def read_job(config: ConfigDict, weights: WeightOptions, pipe: pipeline.Pipeline, shape: Sequence[int]) -> Job:
    """Lists the images of the block `config.images` and writes down the recipe.

    Args:
      pipe: whose autoencoder and tokenizer are used.
      shape: [h, w, c] of the latents.

    Raises:
      ValueError, FileNotFoundError: see `sources.load`; also if the autoencoder makes other latents.
    """
    vae, tokenizer = pipe.nets["vae"].config, pipe.tokenizer
    if vae.latent_channels != shape[-1]:
        raise ValueError(
            f"the autoencoder makes latents of {vae.latent_channels} channels, but {shape[-1]} are needed: "
            "it belongs to another model"
        )
    found = sources.load(config.source, config.column, config.split)
    recipe = {
        "holds": "images",
        "vae": sha256_of_params(pipe.params["vae"]),
        "scaling_factor": vae.scaling_factor,
        "posterior": "sample",  # as Stable Diffusion was trained; drawn once, from the image's number
        "noise": NAME,
        "latent_shape": list(shape),
        "tokenizer": sha256_of_tokenizer(tokenizer),
        "tokens": tokenizer.model_max_length,
        "count": len(found),
        "shard_size": SHARD_SIZE,
        "images_sha256": sources.sha256(found),
    }
    options = network_options(weights) | {"dtype": jnp.float32}  # whatever training computes with: it runs once
    net = AutoencoderKL.from_config(pipe.nets["vae"].raw_config, **options)
    return Job(found, net, pipe.params["vae"], tokenizer, recipe, config.batch)


def has_images(workdir: Path) -> bool:
    """Whether `workdir`/images is complete. Raises ValueError if it does not fit its manifest."""
    try:
        return len(Shards(workdir / FOLDER)) > 0
    except FileNotFoundError:
        return False


def check(job: Job, workdir: Path) -> manifest.Recipe:
    """Every check of `need` without encoding anything: also reads every image that is not yet encoded.

    Returns:
      The recipe.

    Raises:
      ValueError: the latents in `workdir` are of other images or of another model, or images cannot be used; names
        the first ten and counts the rest.
    """
    directory = workdir / FOLDER
    manifest.check_same(directory, job.recipe)
    left = _unfinished(directory, job.recipe, range(manifest.shard_count(job.recipe)))
    numbers = [manifest.shard_range(job.recipe, shard) for shard in left]
    problems: list[str] = []
    progress = Progress(sum(map(len, numbers)), "images", title="reading", file=sys.stdout)
    with ThreadPoolExecutor() as threads:
        for shard in numbers:
            problems += filter(None, threads.map(sources.problem, [job.images[number] for number in shard]))
            progress.advance(len(shard))
    progress.close()
    if problems:
        raise ValueError(
            f"{len(problems)} of {len(job.images)} images cannot be used; repair them or take them out: "
            f"{first_ten(problems, '; ')}"
        )
    return job.recipe


def need(job: Job, workdir: Path) -> Shards:
    """The latents in `workdir`/images; first encodes those that are missing.

    Process p of n makes the shards p, p + n, ...

    Raises:
      ValueError: the latents there are of other images or of another model, or an image cannot be read.
      OSError: the disk is full.
    """
    directory = workdir / FOLDER
    about = {"code": f"instaflow_jax {__version__}", "jax": jax.__version__}
    manifest.begin(directory, job.recipe, about)
    mine = range(jax.process_index(), manifest.shard_count(job.recipe), jax.process_count())
    left = _unfinished(directory, job.recipe, mine)
    if left:
        print(f"→ encoding {len(job.images)} images into {directory}: {len(left)} of {len(mine)} shards", flush=True)
        write_shards(job, directory, left)
    devices.barrier("images")
    store.finish(directory, job.recipe)
    devices.barrier("images are complete")
    print(f"{directory}: {len(job.images)} real images", flush=True)
    return Shards(directory)


def _unfinished(directory: Path, recipe: manifest.Recipe, shards: range) -> list[int]:
    return [shard for shard in shards if store.shard_metadata(directory, recipe, shard) is None]


def write_shards(job: Job, directory: Path, shards: Sequence[int]) -> None:
    """Encodes these shards. Raises as `need`."""
    shape, recipe = job.recipe["latent_shape"], job.recipe
    runner = BatchedRunner(make_encode(job.vae), job.batch)
    fixed, features = runner.place(job.params), store.make_features(recipe)
    height, width = (side * job.vae.config.factor for side in shape[:2])
    ranges = {shard: manifest.shard_range(recipe, shard) for shard in shards}
    progress = Progress(sum(map(len, ranges.values())), "images", file=sys.stdout)

    def encoded(numbers: range) -> Iterator[bytes]:
        """The record of each image, while threads read the next ones."""
        images = [job.images[number] for number in numbers]
        pixels = threads.map(lambda image: sources.pixels(image, height, width), images)
        ids = tokenize_quietly(job.tokenizer, [image.caption for image in images])
        for rows in runner.batches(len(numbers)):
            eps = np.stack([noise(0, number, shape) for number in numbers[rows]])
            X1 = runner(fixed, np.stack(list(itertools.islice(pixels, len(eps)))), eps)
            for number, image, tokens, latent in zip(numbers[rows], images[rows], ids[rows], X1, strict=True):
                _check_finite(image, latent)
                yield store.serialize(features, recipe, prompt=image.caption, ids=tokens, seed=number, X1=latent)
            progress.advance(len(X1))

    with ThreadPoolExecutor() as threads:
        for shard in shards:
            store.write_shard(directory, recipe, shard, encoded(ranges[shard]))
    progress.close()


def make_encode(vae: Net) -> Callable[[Params, jax.Array, jax.Array], jax.Array]:
    """`encode(params, images, eps) → X1`: bytes [B, H, W, 3] and float16 noise to scaled latents in float16."""

    def encode(params: Params, images, eps):
        return vae.apply(params, to_pixels(images), eps.astype(jnp.float32), method="encode").astype(jnp.float16)

    return encode


def _check_finite(image: RealImage, latent: np.ndarray) -> None:
    if not np.isfinite(latent).all():
        raise ValueError(f"{image.where}: its latents are not finite in float16; take it out, or use another model")
