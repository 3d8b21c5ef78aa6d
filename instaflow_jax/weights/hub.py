"""Where a network's files are: folders and hub ids in diffusers / transformers layout, and which file forms they hold."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from instaflow_jax.infra.files import read_json


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one family of networks is named on disk.

    Attributes:
      stem: weight file without ending, "diffusion_pytorch_model" or "model".
      pickle: the same for `.bin` files.
      flax: name of the old Flax file.
      respell: an old key → today's key.
      flax_spell: today's name → the old Flax class's, where it kept an old one.
      ignore: patterns of keys that are not part of the network (a classifier head, say).
    """

    stem: str = "diffusion_pytorch_model"
    pickle: str = "diffusion_pytorch_model"
    flax: str = "diffusion_flax_model.msgpack"
    rename_key: Callable[[str], str] = lambda key: key
    to_flax_name: Callable[[str], str] = lambda name: name
    ignore: tuple[str, ...] = ()


def find(source: str | Path, subfolder: str, layout: Layout, variant: str | None) -> Path:
    """The local folder that holds a network's `config.json` and weights, downloaded from the hub if need be.

    Raises:
      FileNotFoundError: no such folder, and `source` does not read as a hub id or cannot be had from it.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / subfolder).is_dir():
            raise FileNotFoundError(f"{folder} has no folder {subfolder!r}; it holds {_listing(folder)}")
        return folder / subfolder
    prefix = f"{subfolder}/" if subfolder else ""
    for patterns in _forms(layout, variant):
        root = snapshot(str(source), [prefix + p for p in ("config.json", *patterns)])
        if any(list((root / subfolder).glob(pattern)) for pattern in patterns):
            break
    return root / subfolder


def snapshot(repository: str, patterns: list[str]) -> Path:
    """Files of a hub repository that match `patterns`, from the local cache when offline.

    Raises:
      FileNotFoundError: the name is no hub id, or the hub and the cache have no such repository.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise FileNotFoundError(f"{repository!r} is neither a directory nor a hub id of the form owner/name")
    import huggingface_hub  # here, so that local use needs no network client
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=patterns))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise FileNotFoundError(
            f"{repository!r} is not a directory, and the hub does not give it: {str(error).splitlines()[0]}"
        ) from error


def _forms(layout: Layout, variant: str | None) -> list[tuple[str, ...]]:
    """File patterns of each form that weights come in, best first."""
    dot = f".{variant}" if variant else ""
    forms = []
    for stem, ending in ((layout.stem, "safetensors"), (layout.pickle, "bin")):
        index = {f"{stem}.{ending}.index{dot}.json", f"{stem}.{ending}{dot}.index.json"}
        forms += [(f"{stem}{dot}.{ending}",), (*sorted(index), f"{stem}{dot}-?????-of-?????.{ending}")]
    return forms if variant else [*forms, (layout.flax,)]


def weight_files(directory: Path, layout: Layout, variant: str | None) -> list[Path]:
    """The files of the best form present.

    Raises:
      FileNotFoundError: no form is present, or an index names a shard that is missing.
    """
    for first, *others in _forms(layout, variant):
        index = [directory / name for name in (first, *others) if (directory / name).is_file()]
        if index and index[0].name.endswith(".json"):
            return _shards(index[0])
        if index:
            return index
    asked = f"variant {variant!r} of " if variant else ""
    raise FileNotFoundError(
        f"{directory} has no {asked}weights ({layout.stem}.safetensors, {layout.pickle}.bin, their "
        f"shards or {layout.flax}); it holds {_listing(directory)}. A name such as "
        "'model.fp16.safetensors' is read with variant='fp16'."
    )


def _shards(index: Path) -> list[Path]:
    files = [index.parent / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    absent = [f.name for f in files if not f.is_file()]
    if absent:
        raise FileNotFoundError(f"{index} names shards that are not there: {', '.join(absent)}. Download them anew.")
    return files


def _listing(directory: Path) -> str:
    names = sorted(p.name for p in directory.iterdir())
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "") if names else "nothing"


def read_config(directory: Path, class_name: str) -> dict[str, Any]:
    """`config.json` of a network, checked to be of the class asked for.

    Raises:
      FileNotFoundError, ValueError: no such file, broken JSON, or another class's config.
    """
    raw = read_json(directory / "config.json")
    named = {n.removeprefix("Flax") for n in (raw.get("_class_name"), *(raw.get("architectures") or ())) if n}
    if named and class_name not in named:
        raise ValueError(f"{directory / 'config.json'} describes {' / '.join(sorted(named))}, not {class_name}")
    return raw
