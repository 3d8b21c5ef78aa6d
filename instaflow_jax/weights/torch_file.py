"""Reads tensors from PyTorch's pickled files (`.bin`, `.pth`) without PyTorch and without running code.

Two containers are supported: the zip archive that torch writes since 1.6, and the older stream of pickles, in which
torchvision and pytorch-fid published their weights. Only the few names that describe tensors may be unpickled. Other
objects that training frameworks put into a `.ckpt` (callbacks, settings, numpy numbers) become placeholders that do
nothing, and every other name is refused.
"""

import collections
import functools
import io
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np

from instaflow_jax.infra.files import wrong_kind

_STORAGES = {"DoubleStorage": np.float64, "FloatStorage": np.float32, "HalfStorage": np.float16}
_STORAGES |= {"BFloat16Storage": ml_dtypes.bfloat16, "LongStorage": np.int64, "IntStorage": np.int32}
_STORAGES |= {"ShortStorage": np.int16, "CharStorage": np.int8, "ByteStorage": np.uint8, "BoolStorage": np.bool_}
# torch saves the types without a storage class of their own as bytes and a dtype.
_UNTYPED = "UntypedStorage"
_STORAGES |= {_UNTYPED: np.uint8}
_DTYPES = {name: np.dtype(name) for name in ("uint16", "uint32", "uint64")}
_DTYPES |= {name: np.dtype(getattr(ml_dtypes, name)) for name in ("float8_e4m3fn", "float8_e5m2")}
_DTYPES |= {name: np.dtype(getattr(ml_dtypes, name)) for name in ("float8_e4m3fnuz", "float8_e5m2fnuz")}
_DAMAGED = (pickle.UnpicklingError, zipfile.BadZipFile, struct.error, EOFError, LookupError)  # raised by damaged files
_DAMAGED += (ValueError, TypeError, AttributeError, OverflowError)
_DAMAGED += (zlib.error, RuntimeError)  # zip members: damaged, of an unknown method, encrypted; endless nesting
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # first pickle of the container used before torch 1.6


class _Dtype(str):
    """A storage class seen in a pickle, e.g. 'FloatStorage'."""


class _Storage:
    """The flat numbers behind one or more tensors, read on first use, so that an optimizer's state is never read.

    In the older container the numbers follow the pickle; its reader sets `data` then.
    """

    def __init__(self, dtype, read: Callable[[], np.ndarray] | None = None):
        self.dtype, self._read = np.dtype(dtype), read

    @functools.cached_property
    def data(self) -> np.ndarray:
        return self._read()


class _Tensor:
    """A strided view of a storage; `dtype` is that of the elements if the storage holds bytes."""

    def __init__(
        self,
        storage: _Storage,
        offset: int,
        shape: tuple[int, ...],
        stride: tuple[int, ...],
        dtype: np.dtype | None = None,
    ):
        self.storage, self.offset, self.shape, self.stride, self.dtype = storage, offset, shape, stride, dtype

    def array(self) -> np.ndarray:
        flat = self.storage.data if self.dtype is None else self.storage.data.view(self.dtype)
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))
        if 0 not in self.shape and (min(self.offset, *self.stride, 0) < 0 or last >= flat.size):
            raise pickle.UnpicklingError("a tensor reaches beyond its storage")
        strides = [s * flat.itemsize for s in self.stride]
        # From bytes, because numpy's own view functions do not take float8.
        start = self.offset * flat.itemsize if flat.size else 0
        view = np.ndarray(self.shape, flat.dtype, flat.view(np.uint8), start, strides)
        return np.ascontiguousarray(view).reshape(self.shape)


def _rebuild_tensor(storage, offset, shape, stride, *_unused):
    return _Tensor(storage, offset, shape, stride)


def _rebuild_untyped(storage, offset, shape, stride, _requires_grad, _hooks, dtype, *_unused):
    return _Tensor(storage, offset, shape, stride, dtype)


def _rebuild_parameter(tensor, *_unused):
    return tensor


_ALLOWED = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_untyped,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch.storage", _UNTYPED): _Dtype(_UNTYPED),
} | {("torch", name): dtype for name, dtype in _DTYPES.items()}
# Modules and names that become placeholders: training frameworks and what their states contain. None is imported.
_IGNORED = re.compile(r"(pytorch_lightning|lightning\w*|omegaconf|numpy|_codecs|typing|ldm)(\.|$)")
_IGNORED_NAMES = {
    "__builtin__": ("bool", "dict", "float", "int", "list", "object", "set", "str", "tuple"),
    "collections": ("Counter", "defaultdict", "deque"),
}
_IGNORED_NAMES["builtins"] = _IGNORED_NAMES["__builtin__"]


class _Placeholder:
    """Replaces an object that is not a tensor: it can be created, filled and called, and does nothing."""

    def __new__(cls, *_arguments, **_named):
        return super().__new__(cls)

    def _do_nothing(self, *_arguments, **_named):
        return None

    __init__ = __setstate__ = __setitem__ = append = extend = add = __call__ = _do_nothing


class _Unpickler(pickle.Unpickler):
    """Builds dicts, lists, numbers and tensors; refuses every name that is not listed above."""

    def __init__(self, file, storage_of):
        super().__init__(file, encoding="utf-8")
        self.storage_of = storage_of

    def find_class(self, module, name):
        if module == "torch" and name in _STORAGES:
            return _Dtype(name)
        if _IGNORED.match(module) or name in _IGNORED_NAMES.get(module, ()):
            return _Placeholder
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks to run {module}.{name}")
        return _ALLOWED[module, name]

    def persistent_load(self, pid):
        kind, storage, key, _location, size, *_ = pid
        if kind != "storage" or not isinstance(storage, _Dtype):
            raise pickle.UnpicklingError(f"unknown persistent object {kind!r}")
        return self.storage_of(_STORAGES[storage], str(key), int(size))


def _read_zip(file) -> dict:
    archive = zipfile.ZipFile(file)
    entry = next((n for n in archive.namelist() if n.endswith("/data.pkl") or n == "data.pkl"), None)
    if entry is None:
        raise pickle.UnpicklingError("it is a zip archive without data.pkl")
    root = entry.removesuffix("data.pkl")
    if root + "byteorder" in archive.namelist() and archive.read(root + "byteorder") != b"little":
        raise pickle.UnpicklingError("its numbers are big-endian")
    storages = {}

    def storage_of(dtype, key, size):
        if key not in storages:
            storages[key] = _Storage(dtype, lambda: np.frombuffer(archive.read(f"{root}data/{key}"), dtype, count=size))
        return storages[key]

    return _Unpickler(io.BytesIO(archive.read(entry)), storage_of).load()


def _read_stream(file) -> dict:
    storages = {}

    def storage_of(dtype, key, size):
        return storages.setdefault(key, _Storage(dtype))

    def load():
        return _Unpickler(file, storage_of).load()

    if load() != _LEGACY_MAGIC:
        raise pickle.UnpicklingError("it is not a PyTorch file")
    load(), load()  # protocol version, description of the writing machine
    state = load()
    for key in load():
        storage, (size,) = storages[key], struct.unpack("<q", file.read(8))
        storage.data = np.frombuffer(file.read(size * storage.dtype.itemsize), storage.dtype, count=size)
    return state


def read(path: str | Path) -> dict[str, np.ndarray]:
    """The tensors of a PyTorch file by key, those inside {"state_dict": …} if there is such a wrapper.

    Raises:
      ValueError: the file is truncated, is not a PyTorch file, or its pickle asks for code (which is never run).
    """
    try:
        with open(path, "rb") as file:
            is_zip = zipfile.is_zipfile(file)  # moves the file position
            file.seek(0)
            state = _read_zip(file) if is_zip else _read_stream(file)
            state = state.get("state_dict", state) if isinstance(state, dict) else {}
            named = {key: value for key, value in state.items() if isinstance(key, str)}
            tensors = {key: value.array() for key, value in named.items() if isinstance(value, _Tensor)}
    except FileNotFoundError:
        raise
    except (*_DAMAGED, OSError) as error:
        reason = wrong_kind(path) or (
            f"{error}; the file may be truncated or contain more than tensors. Download it again, or save it as "
            "safetensors."
        )
        raise ValueError(f"{path} is not readable as PyTorch weights: {' '.join(reason.split())}") from error
    if not tensors:
        raise ValueError(f"{path} contains no named tensors; use a file with a state dict")
    return tensors
