"""`manifest.json`: by what recipe a directory of pairs was made, so that no other recipe's are ever put beside them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from instaflow_jax.infra.files import read_json, sha256_of_json, write_json

FORMAT = 1
MANIFEST = "manifest.json"
Recipe = Mapping[str, Any]


def shard_count(recipe: Recipe) -> int:
    return -(-recipe["count"] // recipe["shard_size"])


def shard_range(recipe: Recipe, shard: int) -> range:
    """The numbers of the pairs that a shard holds."""
    first = shard * recipe["shard_size"]
    return range(first, min(first + recipe["shard_size"], recipe["count"]))


def begin(directory: Path, recipe: Recipe, about: Mapping[str, Any]) -> None:
    """Writes the manifest, or makes sure that the one there is of the same recipe.

    Args:
      about: what is good to know and does not decide the pairs: versions, config, where the teacher was read from.

    Raises:
      ValueError: the directory holds pairs of another recipe; names the fields that differ.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / MANIFEST
    if path.is_file():
        _check_same(path, read(directory)["recipe"], recipe)
    else:
        recipe = json.loads(json.dumps(recipe))
        write_json(path, {"format": FORMAT, "recipe": recipe, "recipe_sha256": sha256_of_json(recipe), "about": about})


def read(directory: Path) -> dict[str, Any]:
    """The manifest, which must be one that this version reads and that nobody has edited.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is broken, newer, or not what it was when it was written.
    """
    path = Path(directory) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {directory} holds no pairs; make them with configs/generate.py")
    manifest = read_json(path)
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{path}: format {manifest.get('format')!r} is not {FORMAT}, the one this version reads")
    if sha256_of_json(manifest["recipe"]) != manifest["recipe_sha256"]:
        raise ValueError(
            f"{path}: the recipe does not agree with its checksum, so it was changed after the pairs were "
            "made; put the original back"
        )
    return manifest


def _check_same(path: Path, there: Recipe, wanted: Recipe) -> None:
    here = json.loads(json.dumps(wanted))
    differ = [name for name in sorted({*there, *here}) if there.get(name) != here.get(name)]
    if differ:
        listed = "; ".join(f"{name} is {_short(there.get(name))}, not {_short(here.get(name))}" for name in differ)
        raise ValueError(
            f"{path} is of other pairs: {listed}. Take another directory, or delete this one to replace its pairs"
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
