"""Files on disk: atomic writes, JSON, and hashes of contents."""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, the user's quota, the largest file allowed


@contextlib.contextmanager
def naming(path: str | Path, size: int | None) -> Iterator[None]:
    """Names `path` in the OSError of a block that writes it, and on a full disk the room that is needed and free.

    Args:
      size: bytes of the complete file or directory; None if unknown.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(error.errno, f"cannot write {path}: {reason}{_room(Path(path), error.errno, size)}") from error


@contextlib.contextmanager
def as_os_error(kind: type[Exception]) -> Iterator[None]:
    """Turns a library's own error about a failed write, which has the system's number in its text, into an OSError."""
    try:
        yield
    except kind as error:
        code = re.search(r"os[ _]error(?:_code=')? ?(\d+)", str(error))
        if not code:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1]))) from error


def _room(path: Path, code: int | None, size: int | None) -> str:
    """How the message about a failed write ends: nothing, unless the disk is full."""
    if code not in _FULL or size is None:
        return ""
    folder = next((parent for parent in path.absolute().parents if parent.is_dir()), Path("/"))
    free = shutil.disk_usage(folder).free
    return f"; it takes {format_bytes(size)} and {format_bytes(free)} are free: make room and start again"


def user_cache() -> Path:
    """Where files that can be had again are kept: $XDG_CACHE_HOME/instaflow_jax, by default ~/.cache/instaflow_jax."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "instaflow_jax"


def format_bytes(size: int) -> str:
    """A number of bytes as text: "532 bytes", "12.3 kB", "3.4 GB"."""
    if size < 1000:
        return f"{size} bytes"
    power = min((len(str(size)) - 1) // 3, 4)
    return f"{size / 1000**power:.1f} {('kB', 'MB', 'GB', 'TB')[power - 1]}"


@contextlib.contextmanager
def atomic_write(path: str | Path, size: int | None = None) -> Iterator[Path]:
    """Yields a temporary path that is renamed to `path` when the block ends without an error, and deleted otherwise.

    The contents are flushed to disk before the rename, so a crash never leaves a truncated file under `path`.

    Args:
      size: bytes of the complete file, for the message on a full disk; None if unknown.

    Raises:
      OSError: naming `path`, if it could not be written.
    """
    path = Path(path)
    temporary = temporary_name(path)
    try:
        with naming(path, size):
            temporary.touch()
            mode = temporary.stat().st_mode  # the umask's; safetensors' writer would make the file private to its owner
            yield temporary
            temporary.chmod(mode)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Yields a new directory that is renamed to `target` when the block ends without an error, and deleted otherwise.

    A `target` that exists is replaced only then. If the process is killed between the two renames, the old directory
    stays as `target`.old, and the next call restores it.
    """
    temporary, old = (target.with_name(target.name + ending) for ending in (".tmp", ".old"))
    if old.exists() and not target.exists():  # killed between the renames
        old.rename(target)
    for left in (temporary, old):
        shutil.rmtree(left, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if target.exists():
            target.rename(old)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


_DAY = 86_400  # seconds
_tidied: set[Path] = set()
_tidying = threading.Lock()


def temporary_name(path: Path) -> Path:
    """A hidden name beside `path` that is unique to this process.

    The first name in a directory also deletes the temporary files that killed processes of this machine left there,
    after a day if they ran in another container. Files that have this process's id are then from an earlier process
    with the same id; later they are its own.
    """
    with _tidying:
        if path.parent not in _tidied:
            _remove_stale(path.parent)
            _tidied.add(path.parent)
    return path.with_name(f".{path.name}.{_system()}.{os.getpid()}")


def _system() -> str:
    """The machine, and where process ids mean the same: containers may share a host's name and disks, but not ids."""
    namespace = Path("/proc/self/ns/pid")  # only Linux has it
    return f"{socket.gethostname()}-{namespace.stat().st_ino if namespace.exists() else 0}"


def _remove_stale(directory: Path) -> None:
    for path in directory.glob(f".*.{socket.gethostname()}-*.*"):
        with contextlib.suppress(FileNotFoundError, PermissionError):  # it is gone by now, or another user's
            if _is_stale(path):
                path.unlink()


def _is_stale(path: Path) -> bool:
    """Whether a temporary file's process has ended; of one in another container: whether the file is a day old."""
    begin, _, pid = path.name.rpartition(".")
    if not pid.isdigit() or not begin.rpartition("-")[2].isdigit():
        return False  # not a name of ours
    if begin.endswith(f".{_system()}"):
        return not _is_running(int(pid))
    return time.time() - path.stat().st_mtime > _DAY


def _is_running(pid: int) -> bool:
    """Whether another process has this id."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid != os.getpid()


def write_bytes(path: str | Path, content: bytes | memoryview) -> None:
    """Writes a file atomically. Raises OSError naming the file and, on a full disk, its size."""
    with atomic_write(path, len(content)) as temporary:
        temporary.write_bytes(content)


def write_text(path: str | Path, text: str) -> None:
    """Writes a UTF-8 text file atomically. Raises OSError as `write_bytes` does."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | Path, content: Any, *, indent: int = 1) -> None:
    """Writes a JSON file atomically. Raises OSError naming the file."""
    write_text(path, json.dumps(content, indent=indent) + "\n")


def wrong_kind(path: str | Path) -> str:
    """Why a file cannot be what its name says (a directory, an empty file, …) and the remedy; "" if it may be."""
    path = Path(path)
    if path.is_dir():
        return "it is a directory; use a file"
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        return "it is empty, perhaps truncated; download or save it again"
    if start.startswith(b"version https://git-lfs"):
        return "it is only a git-lfs pointer; run 'git lfs pull' where it was cloned, or download the file itself"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "it is a web page; download the file itself"
    return ""


def read_json(path: str | Path, *, remedy: str = "the file may be truncated") -> dict[str, Any]:
    """The object in a JSON file.

    Args:
      remedy: what the error message advises if the file is not valid JSON.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not valid JSON, or not an object.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))  # editors on Windows write a byte-order mark
    except (ValueError, RecursionError, OSError) as error:  # ValueError includes UnicodeDecodeError
        reason = wrong_kind(path)
        raise ValueError(f"{path} is not valid JSON{f': {reason}' if reason else f' ({error}); {remedy}'}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} contains a JSON {type(content).__name__} where an object {{…}} is needed; {remedy}")
    return content


_OWN = "checksum"  # the field of a JSON object that holds the checksum of the others


def write_checked_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object with a checksum of its own. Raises OSError naming the file."""
    write_json(path, {**content, _OWN: _checksum(content)})


def read_checked_json(path: Path, fields: Collection[str], *, remedy: str) -> dict[str, Any]:
    """An object that `write_checked_json` wrote, or version 0.1 without a checksum.

    Args:
      fields: those it may have, so that a damaged name is noticed too.
      remedy: what the error message advises.

    Raises:
      FileNotFoundError, ValueError: see `read_json`; also if the object does not match its checksum.
    """
    content = read_json(path, remedy=remedy)
    checksum = content.pop(_OWN, None)
    if not content.keys() <= set(fields) or checksum not in (None, _checksum(content)):
        raise ValueError(
            f"{path} does not match its checksum, so it is damaged or was edited after it was made; {remedy}"
        )
    return content


def _checksum(content: Mapping[str, Any]) -> str:
    return sha256_of_json(json.loads(json.dumps(content)))  # as it is read back: keys are strings


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


CHECKSUMS = "checksums.json"


def write_checksums(directory: Path, *, parts: Collection[str] = ()) -> None:
    """Writes `directory`/checksums.json, the SHA-256 of every file below `directory`; hidden files are left out.

    Args:
      parts: files and folders at the top of `directory` to list; all of them if empty.

    Raises:
      OSError: naming the file.
    """
    paths = [path.relative_to(directory) for path in sorted(directory.rglob("*")) if path.is_file()]
    listed = [p for p in paths if (not parts or p.parts[0] in parts) and not any(n.startswith(".") for n in p.parts)]
    found = {p.as_posix(): sha256_of_file(directory / p) for p in listed if p.as_posix() != CHECKSUMS}
    write_json(directory / CHECKSUMS, {"files": found, "sha256": sha256_of_json(found)})


@contextlib.contextmanager
def renew_checksums(directory: Path) -> Iterator[None]:
    """Removes the checksums of `directory` while the block changes its files, then writes new ones.

    So a process that is killed in between leaves no checksums that do not fit.
    """
    (directory / CHECKSUMS).unlink(missing_ok=True)
    yield
    write_checksums(directory)


def find_damage(directory: Path, *, parts: Collection[str] = ()) -> str | None:
    """What is wrong with the first damaged file of a directory that `write_checksums` wrote for.

    Returns:
      None if nothing is wrong, or there are no checksums, as in directories of version 0.1 and of other programs.

    Args:
      parts: files and folders at the top of `directory` to read; all of them if empty.
    """
    manifest = directory / CHECKSUMS
    if not manifest.is_file():
        return None
    try:
        content = read_json(manifest)
        files, intact = content["files"], sha256_of_json(content["files"]) == content["sha256"]
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        return f"{manifest} is damaged"
    for name, digest in files.items():
        path = directory / name
        if parts and Path(name).parts[0] not in parts:
            continue
        if not path.is_file():
            return f"{path} is missing, though {CHECKSUMS} lists it"
        if sha256_of_file(path) != digest:
            return f"{path} is damaged: its SHA-256 is not the one in {CHECKSUMS}"
    return None


def sha256_of_json(value: Any) -> str:
    """SHA-256 of a JSON value; the order of its keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sha256_of_params(params: Mapping[str, Any]) -> str:
    """SHA-256 of a network's weights by name, shape, dtype and value."""
    digest = hashlib.sha256()
    for name in sorted(params):
        value = np.ascontiguousarray(params[name])
        digest.update(f"{name} {value.shape} {value.dtype}\n".encode())
        digest.update(value)
    return digest.hexdigest()
