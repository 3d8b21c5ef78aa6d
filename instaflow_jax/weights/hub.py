"""Finds a network's files in a folder or hub repository in diffusers or transformers layout; uploads a folder."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from instaflow_jax.infra import stores
from instaflow_jax.infra.files import read_json
from instaflow_jax.infra.messages import first_ten


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one family of networks names its files and weights on disk.

    Attributes:
      stem: name of the safetensors file without its ending, "diffusion_pytorch_model" or "model".
      pickle: the same for `.bin` files.
      flax: name of the old Flax file.
      rename_key: a PyTorch key, which old files may spell differently → the current key.
      to_flax_name: our name → the old Flax class's name, where that kept an old spelling.
      ignore: patterns of keys that are not part of the network (e.g. a classifier head).
    """

    stem: str = "diffusion_pytorch_model"
    pickle: str = "diffusion_pytorch_model"
    flax: str = "diffusion_flax_model.msgpack"
    rename_key: Callable[[str], str] = lambda key: key
    to_flax_name: Callable[[str], str] = lambda name: name
    ignore: tuple[str, ...] = ()


def add_text_model_prefix(key: str) -> str:
    """`encoder.layers…` → `text_model.encoder.layers…`: some text encoders were saved from the inner module."""
    bare = key.startswith(("embeddings.", "encoder.", "final_layer_norm."))
    return f"text_model.{key}" if bare else key


def find(source: str | Path, subfolder: str, layout: Layout, variant: str | None) -> Path:
    """The local folder that holds a network's `config.json` and weights; a hub repository is downloaded if needed.

    Raises:
      FileNotFoundError: there is no such folder, and `source` is not a hub id or the hub cannot provide it.
    """
    folder = stores.local(source)
    if folder.is_dir():
        if not (folder / subfolder).is_dir():
            raise FileNotFoundError(f"{folder} has no folder {subfolder!r}; it contains {_listing(folder)}")
        return folder / subfolder
    prefix = f"{subfolder}/" if subfolder else ""
    for patterns in _forms(layout, variant):
        root = snapshot(str(source), [prefix + p for p in ("config.json", *patterns)])
        if any(list((root / subfolder).glob(pattern)) for pattern in patterns):
            break
    return root / subfolder


def snapshot(repository: str, patterns: list[str]) -> Path:
    """Folder with the files of a hub repository that match `patterns`; from the local cache when offline.

    Raises:
      FileNotFoundError: `repository` is not a hub id, or neither the hub nor the cache has it.
    """
    if not is_id(repository):
        raise FileNotFoundError(f"{repository!r} is neither a directory nor a hub id of the form owner/name")
    import huggingface_hub  # here, so that local use needs no network client
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=patterns))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise FileNotFoundError(
            f"{repository!r} is not a directory, and downloading it from the hub failed: {str(error).splitlines()[0]}"
        ) from error


def is_id(name: str) -> bool:
    """Whether a hub repository could have this name."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name))


def check_upload(repository: str, *, with_token: bool) -> None:
    """Raises ValueError if `repository` is not a hub id, or huggingface_hub knows no token; makes no request."""
    if not is_id(repository):
        raise ValueError(f"config.push={repository!r} is not a hub id of the form owner/name")
    import huggingface_hub

    if with_token and not huggingface_hub.get_token():
        raise ValueError(f"config.push={repository!r} needs a token: run `hf auth login`, or set HF_TOKEN")


def upload(folder: Path, repository: str) -> str:
    """Commits a folder to a hub repository, which is made (public) if there is none; returns the commit's address.

    Raises:
      OSError: the hub refused it or could not be reached.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    network_errors = HfHubHTTPError.__bases__  # those of requests, or of httpx since huggingface_hub 1.0
    try:
        api = huggingface_hub.HfApi()
        api.create_repo(repository, exist_ok=True)
        done = api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload an export")
    except (*network_errors, OSError, RuntimeError, ValueError) as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) else None  # of one file's upload
        reason = " ".join(str(cause or error).split())
        raise OSError(f"uploading {folder} to {repository} failed: {reason}") from error
    return str(done.commit_url)


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
        found = [directory / name for name in (first, *others) if (directory / name).is_file()]
        if found:
            return _shards(found[0]) if found[0].name.endswith(".json") else found
    wanted = f"variant {variant!r} of " if variant else ""
    raise FileNotFoundError(
        f"{directory} has no {wanted}weights ({layout.stem}.safetensors, {layout.pickle}.bin, their shards or "
        f"{layout.flax}); it contains {_listing(directory)}. For a name such as 'model.fp16.safetensors', use "
        "variant='fp16'."
    )


def _shards(index: Path) -> list[Path]:
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
        raise ValueError(f"{index} has no weight_map from keys to shards; download it again")
    files = [index.parent / name for name in sorted(set(table.values()))]
    missing = [f.name for f in files if not f.is_file()]
    if missing:
        raise FileNotFoundError(f"{index} names missing shards: {first_ten(missing)}; download them again")
    return files


def _listing(directory: Path) -> str:
    return first_ten(sorted(p.name for p in directory.iterdir())) or "nothing"


def read_config(directory: Path, class_name: str) -> dict[str, Any]:
    """`config.json` of a network, checked to describe the class `class_name`.

    Raises:
      FileNotFoundError, ValueError: the file is missing, is not valid JSON, or describes another class.
    """
    raw = read_json(directory / "config.json")
    stated = raw.get("architectures") or []
    stated = [raw.get("_class_name"), *(stated if isinstance(stated, list) else [stated])]
    named = {str(name).removeprefix("Flax") for name in stated if name}
    if named and class_name not in named:
        raise ValueError(f"{directory / 'config.json'} describes {' / '.join(sorted(named))}, not {class_name}")
    return raw
