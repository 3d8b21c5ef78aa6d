"""`manifest.json`: the recipe a directory of pairs was made by, which keeps pairs of another recipe out of it.

Latents of real images (`data.real_images`) are stored in the same way; their recipe says so (`holds`).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from instaflow_jax.infra.files import read_checked_json, sha256_of_json, write_checked_json

FORMAT = 1
MANIFEST = "manifest.json"
_FIELDS = ("format", "recipe", "recipe_sha256", "about", "shards")
Recipe = Mapping[str, Any]


def holds(recipe: Recipe) -> str:
    """What the shards hold: "pairs" or "images"."""
    return recipe.get("holds", "pairs")  # version 0.1 had pairs alone


def again(recipe: Recipe) -> str:
    """What makes missing shards, for error messages."""
    return "start generate again" if holds(recipe) == "pairs" else "start again"


def shard_count(recipe: Recipe) -> int:
    return -(-recipe["count"] // recipe["shard_size"])


def shard_range(recipe: Recipe, shard: int) -> range:
    """The numbers of the pairs in a shard."""
    first = shard * recipe["shard_size"]
    return range(first, min(first + recipe["shard_size"], recipe["count"]))


def begin(directory: Path, recipe: Recipe, about: Mapping[str, Any]) -> None:
    """Writes the manifest, or checks that the existing one has the same recipe.

    Args:
      about: information that does not affect the pairs: versions, config, where the teacher was read from.

    Raises:
      ValueError: the directory holds pairs of another recipe; names the fields that differ.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path, recipe = directory / MANIFEST, json.loads(json.dumps(recipe))
    check_same(directory, recipe)
    if not path.is_file():
        content = {"format": FORMAT, "recipe": recipe, "recipe_sha256": sha256_of_json(recipe), "about": about}
        write_checked_json(path, content)


def check_same(directory: Path, recipe: Recipe) -> None:
    """Raises ValueError, naming the fields that differ, if the directory holds pairs of another recipe."""
    path, recipe = directory / MANIFEST, json.loads(json.dumps(recipe))
    if not path.is_file():
        return
    found = read(directory)["recipe"]
    if differ := [name for name in sorted({*found, *recipe}) if found.get(name) != recipe.get(name)]:
        listed = "; ".join(f"{name} is {_short(found.get(name))}, not {_short(recipe.get(name))}" for name in differ)
        raise ValueError(
            f"{path} belongs to other {holds(recipe)}: {listed}. Use another directory, or delete this one to replace "
            f"its {holds(recipe)}"
        )


def read(directory: Path) -> dict[str, Any]:
    """The manifest, checked for its format version and its checksums.

    Raises:
      FileNotFoundError: there is no manifest.
      ValueError: it is not valid JSON, has another format version, or was edited.
    """
    path = Path(directory) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {directory} holds no pairs; make them with configs/generate.py")
    manifest = read_checked_json(path, _FIELDS, remedy="restore the original file")
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{path}: format {manifest.get('format')!r} is not {FORMAT}, the one this version reads")
    if sha256_of_json(manifest["recipe"]) != manifest["recipe_sha256"]:
        raise ValueError(
            f"{path}: the recipe does not match its checksum, so it was edited after the pairs were made; "
            "restore the original file"
        )
    return manifest


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
