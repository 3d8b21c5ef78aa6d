"""PyTorch weights ⇄ ours, by name, strict: every stored weight is used once or loading fails, naming all offenders.

Reads a directory (or hub id) in diffusers / transformers layout: safetensors, sharded safetensors, `.bin`, sharded
`.bin`, fp16 and other variants of these, and the `.msgpack` of the old Flax classes. Writes safetensors (sharded when
asked) and `.msgpack`. The only file that knows NCHW.
"""
import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy
from flax import serialization

from instaflow_jax.arrays import Params
from instaflow_jax.models import torch_file

Stored = Mapping[str, Callable[[], np.ndarray]]  # key in the file → reads that tensor

_TORCH_WORD = {"kernel": "weight", "scale": "weight", "embedding": "weight", "mean": "running_mean",
               "var": "running_var"}
_BUFFERS = (r"(^|\.)position_ids$", r"(^|\.)num_batches_tracked$")  # constants that old files carry along


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
    respell: Callable[[str], str] = lambda key: key
    flax_spell: Callable[[str], str] = lambda name: name
    ignore: tuple[str, ...] = ()


# ---------------------------------------------------------------- names and array layouts


def torch_key(name: str) -> str:
    """Our parameter name → PyTorch's."""
    head, _, last = name.rpartition(".")
    return f"{head}.{_TORCH_WORD.get(last, last)}" if head else last


def flax_key(name: str) -> str:
    """Our parameter name → the old Flax classes' with dots: `blocks.0.norm` and `blocks_0.norm` are one."""
    return re.sub(r"\.(\d+)(?=\.|$)", r"_\1", name)


def from_torch(name: str, array: np.ndarray) -> np.ndarray:
    """OIHW → HWIO, (out, in) → (in, out); vectors and embeddings as they are."""
    if array.ndim == 4:
        return array.transpose(2, 3, 1, 0)
    return array.T if array.ndim == 2 and name.endswith("kernel") else array


def to_torch(name: str, array: np.ndarray) -> np.ndarray:
    """The inverse of `from_torch`."""
    if array.ndim == 4:
        return array.transpose(3, 2, 0, 1)
    return array.T if array.ndim == 2 and name.endswith("kernel") else array


# ---------------------------------------------------------------- finding files


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
        root = hub_snapshot(str(source), [prefix + p for p in ("config.json", *patterns)])
        if any(list((root / subfolder).glob(pattern)) for pattern in patterns):
            break
    return root / subfolder


def hub_snapshot(repository: str, patterns: list[str]) -> Path:
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
        raise FileNotFoundError(f"{repository!r} is not a directory, and the hub does not give it: "
                                f"{str(error).splitlines()[0]}") from error


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
    raise FileNotFoundError(f"{directory} has no {asked}weights ({layout.stem}.safetensors, {layout.pickle}.bin, their "
                            f"shards or {layout.flax}); it holds {_listing(directory)}. A name such as "
                            "'model.fp16.safetensors' is read with variant='fp16'.")


def _shards(index: Path) -> list[Path]:
    files = [index.parent / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    absent = [f.name for f in files if not f.is_file()]
    if absent:
        raise FileNotFoundError(f"{index} names shards that are not there: {', '.join(absent)}. Download them anew.")
    return files


def _listing(directory: Path) -> str:
    names = sorted(p.name for p in directory.iterdir())
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "") if names else "nothing"


# ---------------------------------------------------------------- reading


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from disk; FileNotFoundError or ValueError naming the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}); the file may be truncated") from error


def open_weights(path: Path) -> Stored:
    """Key → reader for one weight file, the form told by its ending; nothing is read before it is asked for.

    Raises:
      ValueError: the file is truncated or not what its ending says.
    """
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    if path.suffix == ".msgpack":
        return _ready(_read_msgpack(path))
    return _ready(torch_file.read(path))


def _open_safetensors(path: Path) -> Stored:
    try:
        file = safetensors.safe_open(path, framework="numpy")
        return {key: lambda key=key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: not readable as safetensors ({error}); the file may be truncated, "
                         "download or save it anew.") from error


def _read_msgpack(path: Path) -> dict[str, np.ndarray]:
    try:
        tree = serialization.msgpack_restore(path.read_bytes())
        return {key: np.asarray(leaf) for key, leaf in _leaves(tree)}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: not readable as Flax msgpack ({error}); the file may be truncated, "
                         "download or save it anew.") from error


def _leaves(tree, prefix=""):
    for key, value in tree.items():
        yield from _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]


def _ready(arrays: Mapping[str, np.ndarray]) -> Stored:
    return {key: lambda array=array: array for key, array in arrays.items()}


def load(directory: Path, shapes: dict[str, jax.ShapeDtypeStruct], layout: Layout, variant: str | None) -> Params:
    """Reads the weights in `directory` into arrays named and shaped like `shapes`.

    Raises:
      FileNotFoundError, ValueError: naming the file, and every missing, extra or misshapen weight.
    """
    files = weight_files(directory, layout, variant)
    stored = {}
    for path in files:
        stored |= open_weights(path)
    return fill(stored, shapes, layout, source=str(files[0] if len(files) == 1 else directory),
                flax=files[0].suffix == ".msgpack")


def fill(stored: Stored, shapes: dict[str, jax.ShapeDtypeStruct], layout: Layout, *, source: str,
         flax: bool = False) -> Params:
    """Matches stored tensors with parameter names, strictly; see `load`."""
    skip = re.compile("|".join((*_BUFFERS, *layout.ignore)))
    normal = flax_key if flax else (lambda key: key)
    readers = {normal(layout.respell(key)): read for key, read in stored.items() if not skip.search(key)}
    keys = {(flax_key if flax else torch_key)(name): name for name in shapes}
    params, wrong = {}, []
    for key in keys.keys() & readers.keys():
        array = readers[key]()
        params[keys[key]] = array if flax else from_torch(keys[key], array)
        if params[keys[key]].shape != shapes[keys[key]].shape:
            want = tuple(int(n) for n in to_torch(keys[key], np.empty(shapes[keys[key]].shape, bool)).shape)
            wrong.append(f"{key} has shape {tuple(array.shape)}, the config asks for {want}")
    _complain(source, missing=keys.keys() - readers.keys(), extra=readers.keys() - keys.keys(), misshapen=wrong)
    return {name: np.ascontiguousarray(params[name], shape.dtype) for name, shape in shapes.items()}


def _complain(source: str, **offenders) -> None:
    lines = [f"  {len(names)} {kind}: {', '.join(sorted(names))}" for kind, names in offenders.items() if names]
    if lines:
        raise ValueError("\n".join([f"{source} does not fit the network that config.json describes:", *lines]))


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


# ---------------------------------------------------------------- writing


def save(params: Params, directory: Path, layout: Layout, *, form: str = "safetensors", dtype=np.float32,
         variant: str | None = None, shard_bytes: int | None = None) -> None:
    """Writes weights as the reference libraries name them; each file appears whole or not at all.

    Args:
      form: "safetensors" (PyTorch names and layouts) or "flax" (the old `.msgpack`).
      dtype: type on disk, e.g. np.float16.
      variant: put into the file name, e.g. "fp16".
      shard_bytes: split into numbered files of at most this many bytes, with an index.
    """
    arrays = {name: np.asarray(p).astype(dtype) for name, p in params.items()}
    if form == "flax":
        with whole(directory / layout.flax) as temporary:
            temporary.write_bytes(serialization.msgpack_serialize(_flax_tree(arrays, layout)))
        return
    if form != "safetensors":
        raise ValueError(f"form={form!r} is not one of 'safetensors', 'flax'")
    tensors = {torch_key(n): np.ascontiguousarray(to_torch(n, a)) for n, a in arrays.items()}
    _save_safetensors(tensors, directory, layout.stem, f".{variant}" if variant else "", shard_bytes)


def _save_safetensors(tensors, directory, stem, dot, shard_bytes):
    shards = _split(tensors, shard_bytes)
    names = [f"{stem}{dot}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    names = names if len(shards) > 1 else [f"{stem}{dot}.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        with whole(directory / name) as temporary:
            safetensors.numpy.save_file(shard, temporary, metadata={"format": "pt"})
    if len(shards) > 1:
        where = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        index = {"metadata": {"total_size": sum(a.nbytes for a in tensors.values())}, "weight_map": where}
        with whole(directory / f"{stem}.safetensors.index{dot}.json") as temporary:
            temporary.write_text(json.dumps(index, indent=2))


def _split(tensors: dict[str, np.ndarray], limit: int | None) -> list[dict[str, np.ndarray]]:
    shards, size = [{}], 0
    for key, array in tensors.items():
        if limit and shards[-1] and size + array.nbytes > limit:
            shards, size = [*shards, {}], 0
        shards[-1][key] = array
        size += array.nbytes
    return shards


def _flax_tree(arrays: dict[str, np.ndarray], layout: Layout) -> dict:
    """Nested dicts as the old Flax classes spelled them: diffusers `blocks_0`, transformers `layers` / `0`."""
    tree = {}
    for name, array in arrays.items():
        spelled = layout.flax_spell(name)
        *folders, last = (flax_key(spelled) if layout.stem != "model" else spelled).split(".")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = array
    return tree


@contextlib.contextmanager
def whole(path: Path):
    """A temporary path that becomes `path` when the block ends well, and vanishes when it does not."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
