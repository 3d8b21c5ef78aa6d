"""Runs and models in buckets: each address has a mirror, a folder of a local cache that the stages read and write.

The bucket is the truth. A mirror begins with what the bucket holds: small files at once, weights and shards of pairs
when they are read. `sync` uploads every file that has changed, in the order in which they were written, so that the
bucket only passes through states that a disk could have had: what is safe to kill on a disk is safe to kill here.
Checkpoints are not mirrored; see `infra.checkpoint`.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from instaflow_jax.infra import files
from instaflow_jax.infra.buckets import Bucket, Object, is_address

CHECKPOINTS = "checkpoints"  # folders that only `infra.checkpoint` moves
_INDEX = ".objects.json"
_LATER = re.compile(r"\.array_record-\d+-of-\d+$|\.(safetensors|msgpack)$|(^|/)(orbax|stablehlo)/")
_NOTHING = re.compile(r"(?!)")
_EVERYTHING = re.compile("")
_TEMPORARY = re.compile(r"(^|/)\.|\.(tmp|old)(/|$)|\.orbax-checkpoint-tmp")


class Stamp(NamedTuple):
    """A local file that equals an object: its size and time, and the object's version."""

    size: int
    mtime: int  # ns
    version: str


class Mirror:
    """The local copy of what is below an address.

    Attributes:
      folder: where the copy is.

    Args:
      waits: pattern of the names that are not downloaded before `fetch` asks for them.
    """

    def __init__(self, address: str, waits: re.Pattern):
        self.bucket, self._waits = Bucket(address), waits
        self.folder, self._lock = _claim(self.bucket.address)
        self._here = self._read_index()
        self._objects: dict[str, Object] = {}
        self._fetching = threading.Lock()
        try:
            self.refresh()
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------ from the bucket

    def refresh(self) -> None:
        """Deletes local files that are no longer the bucket's, and downloads the small ones that are new."""
        self._objects = self.bucket.list()
        for name, stamp in list(self._here.items()):
            if name not in self._objects or self._objects[name].version != stamp.version:
                (self.folder / name).unlink(missing_ok=True)
                del self._here[name]
        self._download([name for name in self._objects if not self._is_late(name)])

    def fetch(self, name: str) -> bool:
        """Downloads the object `name`, or all below it but checkpoints; returns whether any was missing here.

        Raises:
          OSError: it could not be read, or takes more room than the cache may have.
        """
        with self._fetching:
            wanted = [n for n in self.names(name) if CHECKPOINTS not in n.removeprefix(name).split("/")]
            for each in wanted:
                if each in self._here:
                    self._here[each] = self._here.pop(each)  # the last read come last
            return self._download(wanted)

    def names(self, folder: str) -> list[str]:
        """The objects at and below a name, as of the last listing."""
        return [name for name in self._objects if not folder or name == folder or name.startswith(folder + "/")]

    def size(self, name: str) -> int | None:
        """Bytes of a file here or, if it is not here, in the bucket; None if it is in neither."""
        path = self.folder / name
        if path.is_file():
            return path.stat().st_size
        return self._objects[name].size if name in self._objects and name not in self._here else None

    def _is_late(self, name: str) -> bool:
        return CHECKPOINTS in name.split("/") or self._waits.search(name) is not None

    def _download(self, names: Iterable[str]) -> bool:
        missing = {name: self.folder / name for name in names if name not in self._here}
        if missing:
            self._make_room(sum(self._objects[name].size for name in missing), missing)
            self.bucket.download(missing, self._objects)
            for name, path in missing.items():
                self._record(name, path.stat(), self._objects[name])
            self._write_index()
        return bool(missing)

    def _make_room(self, needed: int, keep: Iterable[str]) -> None:
        """Deletes other runs' mirrors, then this one's files that can be read again, the longest unread first."""
        free = _limit - _usage(cache())
        for folder in _unused_mirrors() if free < needed else ():
            free += _usage(folder)
            shutil.rmtree(folder)
            if free >= needed:
                break
        for name, stamp in list(self._here.items()) if free < needed else ():
            if _LATER.search(name) and name not in keep and _is(self.folder / name, stamp):
                (self.folder / name).unlink()
                del self._here[name]
                free += stamp.size
            if free >= needed:
                break
        if free < needed:
            raise OSError(
                f"{self.bucket.address} needs {files.format_bytes(needed)} more of the cache {cache()}, which may "
                f"have {files.format_bytes(_limit)}: use a larger --cache_gb, or delete files there"
            )

    # ------------------------------------------------------------ to the bucket

    def sync(self) -> None:
        """Uploads what has changed, in the order of writing, then deletes the objects whose files were deleted."""
        found = {name: path.stat() for name, path in self._files() if CHECKPOINTS not in name.split("/")}
        stamps = {name: self._here.get(name, Stamp(-1, -1, "")) for name in found}
        changed = [name for name, stat in found.items() if stamps[name][:2] != (stat.st_size, stat.st_mtime_ns)]
        for name in sorted(changed, key=lambda name: found[name].st_mtime_ns):
            self._record(name, found[name], self.bucket.upload(self.folder / name, name))
        gone = [name for name in self._here if name not in found and CHECKPOINTS not in name.split("/")]
        self.delete(gone)
        if changed or gone:
            self._write_index()

    def upload_folder(self, source: Path, name: str, marker: str) -> None:
        """Uploads a folder under another name, then the empty object `marker`, which says that it is complete."""
        paths = {f"{name}/{p.relative_to(source).as_posix()}": p for p in source.rglob("*") if p.is_file()}
        for uploaded, item in self.bucket.upload_all(paths).items():
            self._record(uploaded, paths[uploaded].stat(), item)
        path, last = source / marker, f"{name}/{marker}"
        path.touch()
        self._record(last, path.stat(), self.bucket.upload(path, last))
        self._write_index()

    def delete(self, names: Iterable[str]) -> None:
        """Deletes objects in this order; files here stay as they are."""
        names = list(names)
        self.bucket.delete(names)
        for name in names:
            self._here.pop(name, None)
            self._objects.pop(name, None)

    def replace(self, name: str) -> None:
        """Makes `sync` delete every object below a name that is not written again."""
        for each in self.names(name):
            self._here.setdefault(each, Stamp(-1, -1, ""))

    def _record(self, name: str, stat: os.stat_result, item: Object) -> None:
        self._objects[name], self._here[name] = item, Stamp(stat.st_size, stat.st_mtime_ns, item.version)

    # ------------------------------------------------------------ on this machine

    def _files(self) -> Iterator[tuple[str, Path]]:
        """Complete local files and their names."""
        for path in self.folder.rglob("*"):
            name = path.relative_to(self.folder).as_posix()
            if not _TEMPORARY.search(name) and path.is_file():
                yield name, path

    def _read_index(self) -> dict[str, Stamp]:
        """What an earlier process left here; files that it had not uploaded are deleted."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / _INDEX
        index = {name: Stamp(*stamp) for name, stamp in files.read_json(path).items()} if path.is_file() else {}
        for path in [path for path in self.folder.rglob("*") if path.is_file() and path.name != _INDEX]:
            name = path.relative_to(self.folder).as_posix()
            if name not in index or not _is(path, index[name]):
                path.unlink()
        for folder in sorted((path for path in self.folder.rglob("*") if path.is_dir()), reverse=True):
            with contextlib.suppress(OSError):
                folder.rmdir()  # only if it is empty
        return {name: stamp for name, stamp in index.items() if (self.folder / name).is_file()}

    def _write_index(self) -> None:
        files.write_json(self.folder / _INDEX, dict(self._here), indent=0)

    def close(self) -> None:
        """Lets another process use this folder."""
        self._lock.close()


# ---------------------------------------------------------------- the mirrors of this process


_mirrors: dict[str, Mirror] = {}  # by address
_limit = 100 * 10**9  # bytes


def set_limit(size: int) -> None:
    """Bytes that all mirrors of this machine may take together."""
    global _limit
    _limit = size


@contextlib.contextmanager
def open_workdir(workdir: str, *, write: bool) -> Iterator[str]:
    """The folder in which a stage works: `workdir`, or for an address its mirror, which is uploaded at the end.

    Args:
      write: whether the stage will write; an address that refuses that is noticed here.

    Raises:
      ValueError: the client of such addresses is not installed.
      OSError: the bucket cannot be reached, or refuses.
    """
    try:
        if is_address(workdir):
            os.environ.setdefault("EPATH_USE_TF", "false")  # etils, which Orbax uses, would ask TensorFlow for gs://
            mirror = _open(workdir, _LATER)
            if write:
                mirror.bucket.check_writable()
            print(f"{workdir}: files pass through {mirror.folder}", flush=True)
            workdir = str(mirror.folder)
        try:
            yield workdir
        except SystemExit:  # preempted
            sync()
            raise
        sync()
    finally:
        for mirror in _mirrors.values():
            mirror.close()
        _mirrors.clear()


def local(source: str | Path) -> Path:
    """The path of a file or folder on this machine; what is in a bucket is downloaded first.

    Raises:
      FileNotFoundError: there is nothing at the address.
      OSError, ValueError: see `open_workdir`.
    """
    found = mirror_of(source)
    if found is None and is_address(source):
        if Bucket(str(source)).is_object():
            _open(str(source).rpartition("/")[0], _EVERYTHING)
        else:
            _open(str(source), _NOTHING)
        found = mirror_of(source)
    if found is None:
        return Path(source).expanduser()
    mirror, name = found
    mirror.fetch(name)
    if not mirror.names(name) and not (mirror.folder / name).exists():
        raise FileNotFoundError(f"there is nothing at {source}")
    return mirror.folder / name


def is_stored(source: str | Path) -> bool:
    """Whether `source` is an address, or a path in a mirror."""
    return is_address(source) or mirror_of(source) is not None


def address(path: str | Path) -> str:
    """The address of a path in a mirror; any other path as it is."""
    found = mirror_of(path)
    return f"{found[0].bucket.address}/{found[1]}".rstrip("/") if found else str(path)


def fetch(path: Path) -> bool:
    """Downloads what a path in a mirror stands for; returns whether anything was missing."""
    found = mirror_of(path)
    return found is not None and found[0].fetch(found[1])


def size(path: Path) -> int | None:
    """Bytes of a file, also of one that `fetch` has not downloaded yet; None if there is none."""
    found = mirror_of(path)
    if found is None:
        return path.stat().st_size if path.is_file() else None
    return found[0].size(found[1])


def sync() -> None:
    """Uploads what this process has written. Without mirrors this does nothing."""
    for mirror in _mirrors.values():
        mirror.sync()


def refresh() -> None:
    """Makes what other processes have uploaded visible here."""
    for mirror in _mirrors.values():
        mirror.refresh()


def replace(path: Path) -> None:
    """To be called before a folder is replaced as a whole: `sync` deletes the old one's objects."""
    found = mirror_of(path)
    if found:
        found[0].replace(found[1])


def _open(address: str, waits: re.Pattern) -> Mirror:
    address = address.rstrip("/")
    _mirrors[address] = Mirror(address, waits)
    return _mirrors[address]


def mirror_of(source: str | Path) -> tuple[Mirror, str] | None:
    """The mirror of an address or a path, and the rest of the name; None if there is no mirror of it."""
    text = str(source).rstrip("/")
    for address, mirror in _mirrors.items():
        for root in (address, str(mirror.folder)):
            if text == root or text.startswith(root + "/"):
                return mirror, text[len(root) + 1 :]
    return None


# ---------------------------------------------------------------- the cache


def cache() -> Path:
    """The folder of all mirrors, and of nothing else: what is in it may be deleted to make room."""
    return files.user_cache() / "buckets"


def _claim(address: str) -> tuple[Path, IO]:
    """The folder of an address that no other process uses, and the open file that locks it."""
    words = re.sub(r"[^\w.]+", "-", address)[-80:] + "-" + hashlib.sha256(address.encode()).hexdigest()[:8]
    cache().mkdir(parents=True, exist_ok=True)
    for number in range(10**6):
        folder = cache() / (words + (f"~{number}" if number else ""))
        lock = _try_lock(folder)
        if lock:
            return folder, lock
    raise OSError(f"{cache()}: every folder for {address} is in use")


def _try_lock(folder: Path) -> IO | None:
    """The open lock of a mirror's folder; None if another process has it. Its end releases it."""
    file = folder.with_name(folder.name + ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def _unused_mirrors() -> Iterator[Path]:
    """Folders that no process has locked, each locked while the caller deletes it; the longest unused first."""
    folders = [path for path in cache().iterdir() if path.is_dir()]
    for folder in sorted(folders, key=lambda path: path.stat().st_mtime):
        lock = _try_lock(folder)
        if lock:
            with lock:
                yield folder


def _usage(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _is(path: Path, stamp: Stamp) -> bool:
    return path.is_file() and (path.stat().st_size, path.stat().st_mtime_ns) == stamp[:2]
