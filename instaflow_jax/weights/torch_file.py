"""Reads tensors from PyTorch's pickled files (`.bin`, `.pth`) without PyTorch and without running code.

Both containers are read: the zip archive torch writes since 1.6, and the older stream of pickles in which torchvision's
and pytorch-fid's weights were published. Only the handful of names that describe tensors may be unpickled; what training
frameworks leave beside them in a `.ckpt` (callbacks, settings, numbers of numpy) is replaced by objects that do nothing,
and every other name is refused.
"""

import collections
import functools
import io
import pickle
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np

_STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # first pickle of the container used before torch 1.6


class _Dtype(str):
    """A storage class seen in a pickle, e.g. 'FloatStorage'."""


class _Storage:
    """The flat numbers behind one or more tensors, read when first asked for: an optimiser's state never is.

    The older container sets `data` after the pickle.
    """

    def __init__(self, dtype, read: Callable[[], np.ndarray] | None = None):
        self.dtype, self._read = np.dtype(dtype), read

    @functools.cached_property
    def data(self) -> np.ndarray:
        return self._read()


class _Tensor:
    def __init__(self, storage: _Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]):
        self.storage, self.offset, self.shape, self.stride = storage, offset, shape, stride

    def array(self) -> np.ndarray:
        flat = self.storage.data
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))
        if 0 not in self.shape and (min(self.offset, *self.stride, 0) < 0 or last >= flat.size):
            raise pickle.UnpicklingError("a tensor reaches beyond its storage")
        steps = [s * flat.itemsize for s in self.stride]
        view = np.lib.stride_tricks.as_strided(flat[self.offset :], self.shape, steps, writeable=False)
        return np.ascontiguousarray(view).reshape(self.shape)


def _rebuild_tensor(storage, offset, shape, stride, *_unused):
    return _Tensor(storage, offset, shape, stride)


def _rebuild_parameter(tensor, *_unused):
    return tensor


_ALLOWED = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
}


# Training frameworks and the parts of Python their states are pickled with. None of them is imported.
_IDLE = re.compile(r"(pytorch_lightning|lightning\w*|omegaconf|numpy|_codecs|typing|ldm)(\.|$)")
_IDLE_NAMES = {
    "__builtin__": ("bool", "dict", "float", "int", "list", "object", "set", "str", "tuple"),
    "collections": ("Counter", "defaultdict", "deque"),
}
_IDLE_NAMES["builtins"] = _IDLE_NAMES["__builtin__"]


class _Idle:
    """Stands for an object that is no tensor: it may be built, filled and called, and forgets it all."""

    def __new__(cls, *_arguments, **_named):
        return super().__new__(cls)

    def _nothing(self, *_arguments, **_named):
        return None

    __init__ = __setstate__ = __setitem__ = append = extend = add = __call__ = _nothing


class _Unpickler(pickle.Unpickler):
    """Builds dicts, lists, numbers and tensors; no name in the pickle but those above is accepted."""

    def __init__(self, file, storage_of):
        super().__init__(file, encoding="utf-8")
        self.storage_of = storage_of

    def find_class(self, module, name):
        if module == "torch" and name in _STORAGES:
            return _Dtype(name)
        if _IDLE.match(module) or name in _IDLE_NAMES.get(module, ()):
            return _Idle
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
    (entry,) = [n for n in archive.namelist() if n.endswith("/data.pkl") or n == "data.pkl"]
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
    load(), load()  # protocol version, description of the machine that wrote it
    state = load()
    for key in load():
        storage, (size,) = storages[key], struct.unpack("<q", file.read(8))
        storage.data = np.frombuffer(file.read(size * storage.dtype.itemsize), storage.dtype, count=size)
    return state


def read(path: str | Path) -> dict[str, np.ndarray]:
    """The tensors of a PyTorch file, by key. A {"state_dict": …} wrapper is looked through.

    Raises:
      ValueError: the file is truncated, is no PyTorch file, or its pickle asks for code (which is never run).
    """
    try:
        with open(path, "rb") as file:
            state = _read_zip(file) if zipfile.is_zipfile(file) else _read_stream(_rewound(file))
            state = state.get("state_dict", state) if isinstance(state, dict) else {}
            tensors = {key: value.array() for key, value in state.items() if isinstance(value, _Tensor)}
    except (
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        EOFError,
        KeyError,
        ValueError,
        TypeError,
        IndexError,
        AttributeError,
        struct.error,
        OverflowError,
    ) as error:
        raise ValueError(
            f"{path}: not readable as PyTorch weights ({error}); the file may be truncated or hold "
            "more than tensors. Save it again as safetensors, or download it anew."
        ) from error
    if not tensors:
        raise ValueError(f"{path}: holds no named tensors; expected a state dict.")
    return tensors


def _rewound(file):
    file.seek(0)
    return file
