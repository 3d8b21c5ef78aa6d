"""A directory of (X0, text, X1): shards that TFDS opens, a note beside each, and one manifest.

`manifest.json` says by what recipe the pairs were made (teacher, solver, noise, prompts: all that decides their bytes).
Shard s holds pairs s * shard_size and following. It is written under a temporary name, renamed when whole, and then
gets its note: `SHARD.json` with its checksum and the recipe's. A shard with its note is finished and is never touched
again; nothing else about progress is kept. When the last one is finished, the manifest gets the list of shards and TFDS
its metadata.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from instaflow_jax.data import records
from instaflow_jax.data.noise import checksum
from instaflow_jax.data.pairs import manifest as pairs_manifest
from instaflow_jax.data.pairs.manifest import MANIFEST, Recipe, shard_count, shard_range
from instaflow_jax.infra import files
from instaflow_jax.infra.files import sha256_of_json

NAME, SPLIT = "pairs", "train"


def shard_path(directory: Path, recipe: Recipe, shard: int) -> Path:
    """Named as TFDS names it."""
    return directory / f"{NAME}-{SPLIT}.array_record-{shard:05d}-of-{shard_count(recipe):05d}"


def note_path(shard: Path) -> Path:
    return shard.with_name(shard.name + ".json")


def make_features(recipe: Recipe):
    """The TFDS features of a pair: prompt, ids [L], seed (the pair's number, which with the run's seed gives X0), X0 and
    X1 [h, w, c] in float16; `noise_crc` in place of X0 where it is drawn again."""
    import tensorflow_datasets as tfds

    latent = tfds.features.Tensor(shape=tuple(recipe["latent_shape"]), dtype=np.float16, encoding="bytes")
    noise = {"X0": latent} if recipe["store_noise"] else {"noise_crc": tfds.features.Scalar(np.int64)}
    ids = tfds.features.Tensor(shape=(recipe["tokens"],), dtype=np.int32)
    words = {"prompt": tfds.features.Text(), "ids": ids, "seed": tfds.features.Scalar(np.int64)}
    return tfds.features.FeaturesDict(words | noise | {"X1": latent})


def serialize(features, recipe: Recipe, *, prompt: str, ids, seed: int, X0, X1) -> bytes:
    """A record, the same bytes in every process."""
    noise = {"X0": X0} if recipe["store_noise"] else {"noise_crc": checksum(X0)}
    row = {"prompt": prompt, "ids": ids, "seed": seed, "X1": X1} | noise
    return records.stable(features.serialize_example(row))


def write_shard(directory: Path, recipe: Recipe, shard: int, pairs: Iterator[bytes]) -> int:
    """Writes one shard and its note, and returns its size in bytes. Until it is whole it has another name.

    Raises:
      OSError: the disk is full or broken; what was begun is removed, finished shards stay as they are.
    """
    path = shard_path(directory, recipe, shard)
    temporary = files.temporary_name(path)
    try:
        records.write(temporary, pairs)
        numbers = shard_range(recipe, shard)
        note = {
            "file": path.name,
            "first": numbers[0],
            "pairs": len(numbers),
            "bytes": temporary.stat().st_size,
            "sha256": files.sha256_of_file(temporary),
            "recipe_sha256": sha256_of_json(recipe),
        }
        note_path(path).unlink(missing_ok=True)  # that of an earlier file must not speak for this one
        os.replace(temporary, path)
        files.write_json(note_path(path), note)
    except OSError as error:
        raise OSError(
            f"{error}. {path.name} is not finished; finished shards in {directory} are whole: make room and "
            "start again, and it goes on from here"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return note["bytes"]


def finished(directory: Path, recipe: Recipe, shard: int) -> dict[str, Any] | None:
    """The note of a shard that is there in its full length, else None.

    Raises:
      ValueError: it was made by another recipe.
    """
    path = shard_path(directory, recipe, shard)
    if not note_path(path).is_file() or not path.is_file():
        return None
    note = files.read_json(note_path(path))
    if note["recipe_sha256"] != sha256_of_json(recipe):
        raise ValueError(
            f"{note_path(path)}: this shard was made by another recipe (teacher, solver, prompts or seed) "
            f"than {directory / MANIFEST} says; put the right manifest back, or delete the shard"
        )
    return note if path.stat().st_size == note["bytes"] else None


def finish(directory: Path, recipe: Recipe) -> bool:
    """Completes the directory if every shard is finished; says whether it is. Any process may, and twice does no harm."""
    notes = [finished(directory, recipe, shard) for shard in range(shard_count(recipe))]
    if None in notes:
        return False
    manifest = pairs_manifest.read(directory)
    if manifest.get("shards") != notes or not (directory / "dataset_info.json").is_file():
        records.write_metadata(
            directory,
            NAME,
            make_features(recipe),
            {SPLIT: [(note["pairs"], note["bytes"]) for note in notes]},
            version="1.0.0",
            description=f"(X0, text, X1) of {recipe['teacher']['unet']}; see {MANIFEST}",
            license="",
            homepage="",
        )
        files.write_json(directory / MANIFEST, manifest | {"shards": notes})
    return True


def verify(directory: Path) -> dict[str, Any]:
    """Reads every byte again, and returns the manifest.

    Raises:
      FileNotFoundError, ValueError: naming every shard that is missing, unfinished or damaged, and what to do.
    """
    manifest = pairs_manifest.read(directory)
    recipe, faults = manifest["recipe"], []
    for shard in range(shard_count(recipe)):
        path = shard_path(directory, recipe, shard)
        note = finished(directory, recipe, shard)
        if note is None:
            faults.append(f"{path} is missing or not whole")
        elif files.sha256_of_file(path) != note["sha256"]:
            faults.append(f"{path} is damaged: its bytes do not agree with {note_path(path).name}")
    if faults:
        raise ValueError(
            f"{len(faults)} of {shard_count(recipe)} shards must be made again: {'; '.join(faults)}. Delete "
            "the damaged ones and start generate with the same config: it makes just these"
        )
    return manifest
