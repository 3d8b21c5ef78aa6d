"""PyTorch weights ⇄ ours, by name. Every stored weight is used exactly once, or loading fails and names the offenders.

Reads a directory in diffusers or transformers layout: safetensors, `.bin`, shards and variants (fp16) of both, and the
`.msgpack` of the old Flax classes. Writes safetensors (optionally sharded) and `.msgpack`. No other file knows NCHW.
"""

import functools
import json
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from flax import serialization

from instaflow_jax.arrays import Params
from instaflow_jax.infra.files import as_os_error, atomic_write, write_bytes, write_text, wrong_kind
from instaflow_jax.infra.messages import first_ten
from instaflow_jax.weights import torch_file
from instaflow_jax.weights.hub import Layout, weight_files

Stored = Mapping[str, Callable[[], np.ndarray]]  # key in the file → function that reads that tensor
Shapes = Mapping[str, jax.ShapeDtypeStruct]  # our name → shape and dtype of a parameter

_TORCH_WORD = {"mean": "running_mean", "var": "running_var"} | dict.fromkeys(("kernel", "scale", "embedding"), "weight")
_BUFFERS = (r"(^|\.)position_ids$", r"(^|\.)num_batches_tracked$")  # constants in old files

# Types of safetensors that its numpy reader does not know → their numpy types.
_FLOAT8 = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}
_FLOAT8 |= {"F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz, "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz}
_NUMPY_TYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL")


# ---------------------------------------------------------------- names and array layouts


def torch_key(name: str) -> str:
    """Our parameter name → PyTorch's."""
    head, _, last = name.rpartition(".")
    return f"{head}.{_TORCH_WORD.get(last, last)}" if head else last


def flax_key(name: str) -> str:
    """Our parameter name → the old Flax classes' name, with dots: `blocks.0.norm` → `blocks_0.norm`."""
    return re.sub(r"\.(\d+)(?=\.|$)", r"_\1", name)


def from_torch(name: str, array: np.ndarray) -> np.ndarray:
    """OIHW → HWIO, (out, in) → (in, out); vectors and embeddings are unchanged."""
    if array.ndim == 4:
        return array.transpose(2, 3, 1, 0)
    return array.T if array.ndim == 2 and name.endswith("kernel") else array


def to_torch(name: str, array: np.ndarray) -> np.ndarray:
    """Inverse of `from_torch`."""
    if array.ndim == 4:
        return array.transpose(3, 2, 0, 1)
    return array.T if array.ndim == 2 and name.endswith("kernel") else array


# ---------------------------------------------------------------- reading


def open_weights(path: Path) -> Stored:
    """Key → reader for one weight file; its suffix gives the format. Safetensors are read lazily.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is truncated or not in the format of its suffix.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no weight file {path}")
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    if path.suffix == ".msgpack":
        return _in_memory(_read_msgpack(path))
    return _in_memory(torch_file.read(path))


def _open_safetensors(path: Path) -> Stored:
    try:
        file = safetensors.safe_open(path, framework="numpy")  # checks the header, so that it can be parsed below
    except (safetensors.SafetensorError, OSError) as error:
        raise _unreadable(path, "safetensors", error) from error
    with path.open("rb") as raw:
        length = int.from_bytes(raw.read(8), "little")
        header = json.loads(raw.read(length))

    def read(key: str) -> np.ndarray:
        stated = header[key]
        if stated["dtype"] in _NUMPY_TYPES:
            return file.get_tensor(key)
        if stated["dtype"] not in _FLOAT8:
            known = ", ".join((*_NUMPY_TYPES, *_FLOAT8))
            raise ValueError(f"{path}: {key} has the type {stated['dtype']}; convert it to one of {known}")
        dtype, (start, end) = _FLOAT8[stated["dtype"]], stated["data_offsets"]
        flat = np.fromfile(path, np.uint8, count=end - start, offset=8 + length + start)
        return flat.view(dtype).reshape(stated["shape"])

    return {key: functools.partial(read, key) for key in header if key != "__metadata__"}


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file; {} for other files.

    Raises:
      ValueError: the file is truncated.
    """
    if path.suffix != ".safetensors":
        return {}
    try:
        return safetensors.safe_open(path, framework="numpy").metadata() or {}
    except (safetensors.SafetensorError, OSError) as error:
        raise _unreadable(path, "safetensors", error) from error


def _unreadable(path: Path, form: str, error: Exception) -> ValueError:
    reason = wrong_kind(path) or f"{error}; the file may be truncated, download or save it again"
    return ValueError(f"{path} is not readable as {form}: {' '.join(reason.split())}")


def _read_msgpack(path: Path) -> dict[str, np.ndarray]:
    try:
        tree = serialization.msgpack_restore(path.read_bytes())
        return {key: np.asarray(leaf) for key, leaf in _leaves(tree)}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OSError) as error:
        raise _unreadable(path, "Flax msgpack", error) from error


def _leaves(tree, prefix=""):
    for key, value in tree.items():
        yield from _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]


def _in_memory(arrays: Mapping[str, np.ndarray]) -> Stored:
    return {key: lambda array=array: array for key, array in arrays.items()}


def load(directory: Path, shapes: Shapes, layout: Layout, variant: str | None) -> Params:
    """Reads the weights in `directory` into host arrays with the names, shapes and dtypes of `shapes`.

    Raises:
      FileNotFoundError, ValueError: naming the file, and the missing, extra and misshapen weights.
    """
    files = weight_files(directory, layout, variant)
    stored = {}
    for path in files:
        stored |= open_weights(path)
    source = str(files[0] if len(files) == 1 else directory)
    return fill(stored, shapes, layout, source=source, flax=files[0].suffix == ".msgpack")


def fill(stored: Stored, shapes: Shapes, layout: Layout, *, source: str, flax: bool = False) -> Params:
    """Matches stored tensors with parameter names, strictly; see `load`. `source` names them in the error message."""
    skip = re.compile("|".join((*_BUFFERS, *layout.ignore)))
    normal = flax_key if flax else (lambda key: key)
    readers = {normal(layout.rename_key(key)): read for key, read in stored.items() if not skip.search(key)}
    keys = {(flax_key if flax else torch_key)(name): name for name in shapes}
    params, misshapen = {}, []
    for key in keys.keys() & readers.keys():
        array = readers[key]()
        if array.dtype.kind in "cOSUM":
            misshapen.append(f"{key} has the type {array.dtype}, not real numbers")
            continue
        params[keys[key]] = array if flax else from_torch(keys[key], array)
        if params[keys[key]].shape != shapes[keys[key]].shape:
            want = tuple(int(n) for n in to_torch(keys[key], np.empty(shapes[keys[key]].shape, bool)).shape)
            misshapen.append(f"{key} has shape {tuple(array.shape)}, the config asks for {want}")
    raise_for_mismatch(
        f"{source} does not fit the network that config.json describes",
        missing=keys.keys() - readers.keys(),
        extra=readers.keys() - keys.keys(),
        misshapen=misshapen,
    )
    return {name: np.asarray(params[name], shape.dtype, order="C") for name, shape in shapes.items()}


def raise_for_mismatch(what: str, **offenders: Collection[str]) -> None:
    """Raises ValueError if there are offenders: `what` is wrong, then the first ten of each kind, sorted; one line."""
    kinds = [f"{len(names)} {kind}: {first_ten(sorted(names))}" for kind, names in offenders.items() if names]
    if kinds:
        raise ValueError(f"{what}: {'; '.join(kinds)}")


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
    """Writes weights under the reference libraries' names; each file is written atomically.

    Args:
      form: "safetensors" (PyTorch names and layouts) or "flax" (the old `.msgpack`).
      dtype: type on disk, e.g. np.float16.
      variant: part of the file name, e.g. "fp16".
      shard_bytes: split into numbered files of at most this many bytes, with an index.

    Raises:
      ValueError: `form` is unknown.
      OSError: naming the file that could not be written.
    """
    arrays = {name: np.asarray(p).astype(dtype) for name, p in params.items()}
    if form == "flax":
        write_bytes(directory / layout.flax, serialization.msgpack_serialize(_flax_tree(arrays, layout)))
        return
    if form != "safetensors":
        raise ValueError(f"form={form!r} is not one of 'safetensors', 'flax'")
    tensors = {torch_key(n): np.asarray(to_torch(n, a), order="C") for n, a in arrays.items()}
    _save_safetensors(tensors, directory, layout.stem, f".{variant}" if variant else "", shard_bytes)


def _save_safetensors(
    tensors: dict[str, np.ndarray], directory: Path, stem: str, dot: str, shard_bytes: int | None
) -> None:
    shards = _split(tensors, shard_bytes)
    names = [f"{stem}{dot}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    names = names if len(shards) > 1 else [f"{stem}{dot}.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        write_safetensors(directory / name, shard, {})
    if len(shards) > 1:
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        index = {"metadata": {"total_size": sum(a.nbytes for a in tensors.values())}, "weight_map": weight_map}
        write_text(directory / f"{stem}.safetensors.index{dot}.json", json.dumps(index, indent=2))


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes C-contiguous arrays, and strings beside them, atomically. Raises OSError naming the file."""
    size = sum(a.nbytes for a in tensors.values())
    with atomic_write(path, size) as temporary, as_os_error(safetensors.SafetensorError):
        safetensors.numpy.save_file(dict(tensors), temporary, metadata={"format": "pt", **metadata})


def _split(tensors: dict[str, np.ndarray], limit: int | None) -> list[dict[str, np.ndarray]]:
    shards, size = [{}], 0
    for key, array in tensors.items():
        if limit and shards[-1] and size + array.nbytes > limit:
            shards, size = [*shards, {}], 0
        shards[-1][key] = array
        size += array.nbytes
    return shards


def _flax_tree(arrays: dict[str, np.ndarray], layout: Layout) -> dict:
    """Nested dicts with the old Flax classes' names: diffusers `blocks_0`, transformers `layers` / `0`."""
    tree = {}
    for name, array in arrays.items():
        flax_name = layout.to_flax_name(name)
        *parents, last = (flax_key(flax_name) if layout.stem != "model" else flax_name).split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = array
    return tree
