"""PyTorch weights ⇄ ours, by name, strict: every stored weight is used once or loading fails, naming all offenders.

Reads a directory (or hub id) in diffusers / transformers layout: safetensors, sharded safetensors, `.bin`, sharded
`.bin`, fp16 and other variants of these, and the `.msgpack` of the old Flax classes. Writes safetensors (sharded when
asked) and `.msgpack`. The only file that knows NCHW.
"""

import json
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import jax
import numpy as np
import safetensors
import safetensors.numpy
from flax import serialization

from instaflow_jax.arrays import Params
from instaflow_jax.infra.files import atomic_write
from instaflow_jax.weights import torch_file
from instaflow_jax.weights.hub import Layout, weight_files

Stored = Mapping[str, Callable[[], np.ndarray]]  # key in the file → reads that tensor

_TORCH_WORD = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "mean": "running_mean",
    "var": "running_var",
}
_BUFFERS = (r"(^|\.)position_ids$", r"(^|\.)num_batches_tracked$")  # constants that old files carry along


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


# ---------------------------------------------------------------- reading


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
        raise _unreadable(path, error) from error


def read_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says beside its tensors; nothing for other files.

    Raises:
      ValueError: the file is truncated.
    """
    if path.suffix != ".safetensors":
        return {}
    try:
        return safetensors.safe_open(path, framework="numpy").metadata() or {}
    except safetensors.SafetensorError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{path}: not readable as safetensors ({error}); the file may be truncated, download or save it anew."
    )


def _read_msgpack(path: Path) -> dict[str, np.ndarray]:
    try:
        tree = serialization.msgpack_restore(path.read_bytes())
        return {key: np.asarray(leaf) for key, leaf in _leaves(tree)}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path}: not readable as Flax msgpack ({error}); the file may be truncated, download or save it anew."
        ) from error


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
    return fill(
        stored,
        shapes,
        layout,
        source=str(files[0] if len(files) == 1 else directory),
        flax=files[0].suffix == ".msgpack",
    )


def fill(
    stored: Stored, shapes: dict[str, jax.ShapeDtypeStruct], layout: Layout, *, source: str, flax: bool = False
) -> Params:
    """Matches stored tensors with parameter names, strictly; see `load`."""
    skip = re.compile("|".join((*_BUFFERS, *layout.ignore)))
    normal = flax_key if flax else (lambda key: key)
    readers = {normal(layout.rename_key(key)): read for key, read in stored.items() if not skip.search(key)}
    keys = {(flax_key if flax else torch_key)(name): name for name in shapes}
    params, wrong = {}, []
    for key in keys.keys() & readers.keys():
        array = readers[key]()
        params[keys[key]] = array if flax else from_torch(keys[key], array)
        if params[keys[key]].shape != shapes[keys[key]].shape:
            want = tuple(int(n) for n in to_torch(keys[key], np.empty(shapes[keys[key]].shape, bool)).shape)
            wrong.append(f"{key} has shape {tuple(array.shape)}, the config asks for {want}")
    complain(
        f"{source} does not fit the network that config.json describes",
        missing=keys.keys() - readers.keys(),
        extra=readers.keys() - keys.keys(),
        misshapen=wrong,
    )
    return {name: np.asarray(params[name], shape.dtype, order="C") for name, shape in shapes.items()}


def complain(what: str, **offenders: Collection[str]) -> None:
    """ValueError that says `what` is wrong and lists the offenders by kind, if there are any."""
    lines = [f"  {len(names)} {kind}: {', '.join(sorted(names))}" for kind, names in offenders.items() if names]
    if lines:
        raise ValueError("\n".join([f"{what}:", *lines]))


# ---------------------------------------------------------------- writing


def save(
    params: Params,
    directory: Path,
    layout: Layout,
    *,
    form: str = "safetensors",
    dtype=np.float32,
    variant: str | None = None,
    shard_bytes: int | None = None,
) -> None:
    """Writes weights as the reference libraries name them; each file appears whole or not at all.

    Args:
      form: "safetensors" (PyTorch names and layouts) or "flax" (the old `.msgpack`).
      dtype: type on disk, e.g. np.float16.
      variant: put into the file name, e.g. "fp16".
      shard_bytes: split into numbered files of at most this many bytes, with an index.
    """
    arrays = {name: np.asarray(p).astype(dtype) for name, p in params.items()}
    if form == "flax":
        with atomic_write(directory / layout.flax) as temporary:
            temporary.write_bytes(serialization.msgpack_serialize(_flax_tree(arrays, layout)))
        return
    if form != "safetensors":
        raise ValueError(f"form={form!r} is not one of 'safetensors', 'flax'")
    tensors = {torch_key(n): np.asarray(to_torch(n, a), order="C") for n, a in arrays.items()}
    _save_safetensors(tensors, directory, layout.stem, f".{variant}" if variant else "", shard_bytes)


def _save_safetensors(tensors, directory, stem, dot, shard_bytes):
    shards = _split(tensors, shard_bytes)
    names = [f"{stem}{dot}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    names = names if len(shards) > 1 else [f"{stem}{dot}.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        with atomic_write(directory / name) as temporary:
            safetensors.numpy.save_file(shard, temporary, metadata={"format": "pt"})
    if len(shards) > 1:
        where = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        index = {"metadata": {"total_size": sum(a.nbytes for a in tensors.values())}, "weight_map": where}
        with atomic_write(directory / f"{stem}.safetensors.index{dot}.json") as temporary:
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
        spelled = layout.to_flax_name(name)
        *folders, last = (flax_key(spelled) if layout.stem != "model" else spelled).split(".")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = array
    return tree
