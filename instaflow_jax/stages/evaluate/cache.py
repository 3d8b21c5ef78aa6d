"""Measurements that are made once: each is a file named by a hash of everything that decides it."""

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from instaflow_jax.infra import files


class Record(NamedTuple):
    """Numbers, and arrays that belong to them."""

    numbers: dict[str, float]
    arrays: dict[str, np.ndarray]


class Cache:
    """Records in one directory."""

    def __init__(self, directory: Path):
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def get(self, settings: Mapping[str, Any], make: Callable[[], Record]) -> tuple[Record, bool]:
        """The record of these settings, and whether it was cached; if it was not, `make` measures it.

        Raises:
          ValueError: the cached file is damaged.
        """
        path = self._directory / f"{settings['what']}-{files.sha256_of_json(settings)[:16]}.npz"
        if path.is_file():
            return _read(path), True
        record = make()
        about = json.dumps({"settings": settings, "numbers": record.numbers})
        content = io.BytesIO()
        np.savez(content, about=np.array(about), **record.arrays)
        files.write_bytes(path, content.getbuffer())
        return record, False


def _read(path: Path) -> Record:
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
        return Record(json.loads(str(arrays.pop("about")))["numbers"], arrays)
    except (ValueError, KeyError, EOFError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it to measure again") from error
