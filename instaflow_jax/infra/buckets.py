"""Objects in a bucket, always whole: the only file that imports fsspec, the client of every kind of address."""

import contextlib
import dataclasses
import datetime
import logging
import os
import re
import socket
import sys
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec

from instaflow_jax.infra import files

_THREADS = 16  # transfers at a time
_FLAT = ("abfs", "az", "gcs", "gs", "memory", "s3", "s3a")  # stores without folders
_VERSION = ("generation", "ETag", "etag", "LastModified", "mtime", "created")  # a store gives one of these
_EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3"}  # scheme → extra of setup.py that installs its client
_CLIENT_ERRORS = (  # errors of the clients that are not OSErrors
    ("aiohttp", "ClientError"),
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("gcsfs.retry", "HttpError"),
    ("google.auth.exceptions", "GoogleAuthError"),
)
# What gcsfs logs as an error it raises as well; botocore tells where it found its settings.
_LEVELS = {"gcsfs": logging.CRITICAL, "aiobotocore": logging.WARNING, "botocore": logging.WARNING}


@dataclasses.dataclass(frozen=True)
class Object:
    """Size in bytes, and a text that is another one after each write."""

    size: int
    version: str


def is_address(source: str | Path) -> bool:
    """Whether `source` names a bucket (gs://…, s3://…) and not a path of this machine."""
    return re.match(r"[a-z][a-z0-9+.-]*://", str(source)) is not None


@contextlib.contextmanager
def explain(what: str) -> Iterator[None]:
    """Turns every error of a client into an OSError of one line: "cannot `what`: reason"."""
    try:
        yield
    except _errors() as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OSError(f"cannot {what}: {reason[:300]}") from error


def _errors() -> tuple[type[Exception], ...]:
    """OSError, and the errors of those clients that are loaded."""
    loaded = [getattr(sys.modules.get(module), name, None) for module, name in _CLIENT_ERRORS]
    return (OSError, *filter(None, loaded))


class Bucket:
    """The objects below an address, by the rest of their name; hidden names are left out.

    Raises:
      ValueError: no client for such addresses is known, or it is not installed.
      OSError: naming the address, also from every method, if the bucket cannot be reached or refuses.
    """

    def __init__(self, address: str):
        self.address = address.rstrip("/")
        scheme = address.partition("://")[0]
        for name, level in _LEVELS.items():
            logging.getLogger(name).setLevel(level)
        try:
            with explain(f"open {address}"):
                self._fs, self._root = fsspec.core.url_to_fs(self.address)
        except ImportError as error:
            remedy = f"; use pip install -e '.[{_EXTRAS[scheme]}]'" if scheme in _EXTRAS else ""
            raise ValueError(f"{address} needs a package that is not installed: {error}{remedy}") from error
        except ValueError as error:
            raise ValueError(f"{address}: {error}; use gs://…, s3://… or another address that fsspec knows") from error
        self._root = self._root.rstrip("/")

    def is_object(self) -> bool:
        """Whether the address is that of one object."""
        with explain(f"read {self.address}"):
            return self._fs.isfile(self._root)

    def list(self, folder: str = "") -> dict[str, Object]:
        """Every object below `folder`, fresh from the store, by its name below the address."""
        with explain(f"list {self.address}"):
            self._fs.invalidate_cache()
            found = self._fs.find(self._path(folder), detail=True)
        names = {self._name(path): info for path, info in found.items() if info["type"] == "file"}
        return {n: _object(info) for n, info in names.items() if not any(p.startswith(".") for p in n.split("/"))}

    def download(self, targets: Mapping[str, Path], objects: Mapping[str, Object]) -> None:
        """Writes each object to its path, atomically. Raises OSError if one is not as long as in the listing."""

        def one(name: str) -> None:
            targets[name].parent.mkdir(parents=True, exist_ok=True)
            with files.atomic_write(targets[name], objects[name].size) as temporary:
                with explain(f"read {self.address}/{name}"):
                    self._fs.get_file(self._path(name), str(temporary))
                size = temporary.stat().st_size
                if size != objects[name].size:
                    raise OSError(f"{self.address}/{name} has {objects[name].size} bytes, but {size} came")

        self._each(one, targets)

    def upload(self, path: Path, name: str) -> Object:
        """Writes one object from a file; it appears when it is complete."""
        target = self._path(name)
        with explain(f"write {self.address}/{name}"):
            if self.address.partition("://")[0] not in _FLAT:
                self._fs.makedirs(target.rpartition("/")[0], exist_ok=True)
            self._fs.put_file(str(path), target)
            self._fs.invalidate_cache()
            return _object(self._fs.info(target))

    def upload_all(self, sources: Mapping[str, Path]) -> dict[str, Object]:
        """Writes several objects, in no order."""
        uploaded: dict[str, Object] = {}
        self._each(lambda name: uploaded.update({name: self.upload(sources[name], name)}), sources)
        return uploaded

    def delete(self, names: Iterable[str]) -> None:
        """Deletes objects, one after the other in this order."""
        for name in names:
            with explain(f"delete {self.address}/{name}"), contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(self._path(name))

    def check_writable(self) -> None:
        """Writes and deletes a small object. Raises OSError if the store refuses."""
        with explain(f"write to {self.address}"):
            path = self._path(f".writable-{socket.gethostname()}-{os.getpid()}")
            self._fs.pipe_file(path, b"")
            self._fs.rm_file(path)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _name(self, path: str) -> str:
        return path.removeprefix(self._root).lstrip("/")

    def _each(self, work: Any, names: Iterable[str]) -> None:
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="bucket") as threads:
            list(threads.map(work, names))


def _object(info: Mapping[str, Any]) -> Object:
    version = next(info[key] for key in _VERSION if info.get(key))
    seconds = version.timestamp() if isinstance(version, datetime.datetime) else version
    return Object(int(info["size"]), str(seconds))
