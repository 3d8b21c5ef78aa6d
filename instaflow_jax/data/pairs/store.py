"""A directory of (X0, text, X1): shards that TFDS opens, a metadata file beside each shard, and one manifest.

`manifest.json` holds the recipe of the pairs (teacher, solver, noise, prompts: everything that decides their bytes).
Shard s holds the pairs from s * shard_size on. It is written under a temporary name and renamed when complete; then
`SHARD.json` is written with its checksum and the recipe's. A shard with this metadata is finished and never changes;
no other progress is stored. When all shards are finished, the list of shards is added to the manifest, and TFDS's own
metadata is written.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from instaflow_jax.data import records
from instaflow_jax.data.noise import checksum
from instaflow_jax.data.pairs import manifest as pairs_manifest
from instaflow_jax.data.pairs.manifest import MANIFEST, Recipe, again, holds, shard_count, shard_range
from instaflow_jax.infra import files, stores
from instaflow_jax.infra.files import sha256_of_json

SPLIT = "train"
_METADATA = ("file", "first", "pairs", "bytes", "sha256", "recipe_sha256")  # fields of a shard's metadata


def shard_path(directory: Path, recipe: Recipe, shard: int) -> Path:
    """The path of a shard, named as TFDS names it."""
    return directory / f"{holds(recipe)}-{SPLIT}.array_record-{shard:05d}-of-{shard_count(recipe):05d}"


def metadata_path(shard: Path) -> Path:
    return shard.with_name(shard.name + ".json")


def make_features(recipe: Recipe):
    """The TFDS features of a pair: prompt, ids [L], seed, X0 and X1 [h, w, c] in float16.

    `seed` is the pair's number; together with the run's seed it gives X0. If the recipe does not store noise,
    `noise_crc` takes the place of X0. A real image has neither.
    """
    import tensorflow_datasets as tfds

    latent = tfds.features.Tensor(shape=tuple(recipe["latent_shape"]), dtype=np.float16, encoding="bytes")
    noise = {}
    if holds(recipe) == "pairs":
        noise = {"X0": latent} if recipe["store_noise"] else {"noise_crc": tfds.features.Scalar(np.int64)}
    ids = tfds.features.Tensor(shape=(recipe["tokens"],), dtype=np.int32)
    words = {"prompt": tfds.features.Text(), "ids": ids, "seed": tfds.features.Scalar(np.int64)}
    return tfds.features.FeaturesDict(words | noise | {"X1": latent})


def serialize(features, recipe: Recipe, *, prompt: str, ids, seed: int, X1, X0=None) -> bytes:
    """A pair, or a real image without X0, as a record with the same bytes in every process."""
    noise = {} if X0 is None else {"X0": X0} if recipe["store_noise"] else {"noise_crc": checksum(X0)}
    row = {"prompt": prompt, "ids": ids, "seed": seed, "X1": X1} | noise
    return records.stable(features.serialize_example(row))


def write_shard(directory: Path, recipe: Recipe, shard: int, pairs: Iterable[bytes]) -> None:
    """Writes one shard under a temporary name, renames it when complete, writes its metadata, and uploads both.

    Raises:
      OSError: the disk is full or broken. The incomplete shard is removed; finished shards are not changed.
    """
    path = shard_path(directory, recipe, shard)
    temporary, numbers, largest = files.temporary_name(path), shard_range(recipe, shard), 0

    def measured() -> Iterator[bytes]:
        nonlocal largest
        for pair in pairs:
            largest = max(largest, len(pair))
            yield pair

    try:
        records.write(temporary, measured())
        metadata = {
            "file": path.name,
            "first": numbers[0],
            "pairs": len(numbers),
            "bytes": temporary.stat().st_size,
            "sha256": files.sha256_of_file(temporary),
            "recipe_sha256": sha256_of_json(recipe),
        }
        metadata_path(path).unlink(missing_ok=True)  # an earlier file's metadata must not describe this one
        os.replace(temporary, path)
        files.write_checked_json(metadata_path(path), metadata)
        stores.sync()
    except OSError as error:
        raise OSError(
            f"{error}. {path.name} is not finished, which takes about {files.format_bytes(largest * len(numbers))}; "
            f"the finished shards in {directory} are intact: make room and "
            "start again, and the run continues from here"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def shard_metadata(directory: Path, recipe: Recipe, shard: int) -> dict[str, Any] | None:
    """The metadata of a finished shard; None if the shard is missing, unfinished or has another length.

    Raises:
      ValueError: the shard was made by another recipe.
    """
    path = shard_path(directory, recipe, shard)
    size = stores.size(path)
    if not metadata_path(path).is_file() or size is None:
        return None
    remedy = f"restore the original file, or delete it and {again(recipe)}, which makes only this shard"
    metadata = files.read_checked_json(metadata_path(path), _METADATA, remedy=remedy)
    if metadata["recipe_sha256"] != sha256_of_json(recipe):
        raise ValueError(
            f"{metadata_path(path)}: this shard was made by another recipe (teacher, solver, prompts or seed) "
            f"than {directory / MANIFEST} says; restore the right manifest, or delete the shard"
        )
    return metadata if size == metadata["bytes"] else None


def finish(directory: Path, recipe: Recipe) -> bool:
    """Completes the directory if every shard is finished, and returns whether it is complete.

    Any process may call this, also more than once.
    """
    shards = [shard_metadata(directory, recipe, shard) for shard in range(shard_count(recipe))]
    if None in shards:
        return False
    manifest = pairs_manifest.read(directory)
    if manifest.get("shards") != shards or not (directory / "dataset_info.json").is_file():
        stores.fetch(shard_path(directory, recipe, 0))  # TFDS reads the names of the shards from those that are here
        records.write_metadata(
            directory,
            holds(recipe),
            make_features(recipe),
            {SPLIT: [(shard["pairs"], shard["bytes"]) for shard in shards]},
            version="1.0.0",
            description=f"{_describe(recipe)}; see {MANIFEST}",
            license="",
            homepage="",
        )
        files.write_checked_json(directory / MANIFEST, manifest | {"shards": shards})
    return True


def _describe(recipe: Recipe) -> str:
    if holds(recipe) == "pairs":
        return f"(X0, text, X1) of {recipe['teacher']['unet']}"
    return f"(text, X1) of real images, encoded by {recipe['vae']}"


def verify(directory: Path) -> dict[str, Any]:
    """Reads every byte of every shard, compares checksums, and returns the manifest.

    Raises:
      FileNotFoundError, ValueError: lists every shard that is missing, unfinished or damaged, and the way out.
    """
    manifest = pairs_manifest.read(directory)
    recipe, faults = manifest["recipe"], []
    for shard in range(shard_count(recipe)):
        path = shard_path(directory, recipe, shard)
        metadata = shard_metadata(directory, recipe, shard)
        stores.fetch(path)
        if metadata is None:
            faults.append(f"{path} is missing or incomplete")
        elif files.sha256_of_file(path) != metadata["sha256"]:
            faults.append(f"{path} is damaged: its checksum differs from the one in {metadata_path(path).name}")
    if faults:
        raise ValueError(
            f"{len(faults)} of {shard_count(recipe)} shards must be made again: {'; '.join(faults)}. Delete the "
            "damaged ones and start generate with the same config, which makes only these"
        )
    return manifest
