"""ArrayRecord shards that TFDS opens, written and read without TensorFlow."""

import contextlib
import os
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

from instaflow_jax.infra import stores

# One record per chunk, for random access. What we store (PNG, noise, latents) does not compress.
_OPTIONS = "group_size:1,uncompressed"


def stable(record: bytes) -> bytes:
    """The same record with its fields in a fixed order; protobuf's own order changes from process to process."""
    from tensorflow_datasets.proto import tf_example_pb2

    return tf_example_pb2.Example.FromString(record).SerializeToString(deterministic=True)


# ---------------------------------------------------------------- writing


def write(path: Path, records: Iterable[bytes]) -> None:
    """Writes one shard with random access to each record, and flushes it to disk.

    Raises:
      OSError: the shard could not be written; names the file and the reason. An incomplete file stays under `path`.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = _os_errors(path, ArrayRecordWriter, str(path), _OPTIONS)
    try:
        for record in records:
            _os_errors(path, writer.write, record)
        _os_errors(path, writer.close)
    except BaseException:
        with contextlib.suppress(RuntimeError):  # closing a file on a full disk fails again
            writer.close()
        raise
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _os_errors(path: Path, function: Callable, *arguments) -> Any:
    """Calls a function of array_record, which reports every failure of the disk as a RuntimeError."""
    try:
        return function(*arguments)
    except RuntimeError as error:
        raise OSError(f"cannot write {path}: {error}") from error


def write_metadata(directory: Path, name: str, features, splits: dict[str, list[tuple[int, int]]], **about) -> None:
    """Writes the files that `tfds.builder_from_directory(directory)` needs beside the shards.

    Shards are named NAME-SPLIT.array_record-00000-of-00001.

    Args:
      splits: (records, bytes) of every shard, by split.
      about: description, version, license, homepage.
    """
    import tensorflow_datasets as tfds

    def template(**split):
        return tfds.core.ShardedFileTemplate(
            data_dir=directory, dataset_name=name, filetype_suffix="array_record", **split
        )

    infos = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=[count for count, _ in shards],
            num_bytes=sum(size for _, size in shards),
            filename_template=template(split=split),
        )
        for split, shards in splits.items()
    ]
    tfds.folder_dataset.write_metadata(
        data_dir=directory,
        features=features,
        split_infos=infos,
        check_data=False,
        filename_template=template(),
        **about,
    )


# ---------------------------------------------------------------- reading


def open_prepared(name: str, *, split: str, columns: Collection[str], data_dir: str = "") -> tuple[Any, Any]:
    """Opens a set that TFDS has prepared.

    Args:
      name: the set's name ("coco_captions/2014"), or a directory.
      split: one split, or several joined by "+".
      columns: features that the set must have.
      data_dir: where TFDS keeps its sets; "" means its default.

    Returns:
      The serialized records of the split as a sequence, and the set's features.

    Raises:
      FileNotFoundError: there is no prepared set.
      ValueError: there are several, it lacks the split or a column, or it is not stored as array_record.
    """
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(_prepared_directory(name, data_dir or tfds.core.constants.DATA_DIR))
    info = builder.info
    for what, wanted, there in (("split", split.split("+"), info.splits), ("column", columns, info.features)):
        if absent := [each for each in wanted if each not in there]:
            raise ValueError(f"tfds:{name} has no {what} {absent[0]!r}; it has {', '.join(there) or 'none'}")
    if info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        raise ValueError(
            f"tfds:{name} is stored as {info.file_format.value}, which only TensorFlow reads; "
            "prepare it with file_format='array_record'"
        )
    # Raw bytes: TFDS's own decoding would also decode images that only their captions are read of.
    return builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES), info.features


def _prepared_directory(name: str, data_dir: str) -> Path:
    """The one directory that holds the set. TFDS's own search by name would import TensorFlow."""
    root = stores.local(name)
    root = root if root.is_dir() else Path(data_dir).expanduser() / name
    found = sorted(path.parent for path in root.rglob("dataset_info.json"))
    if not found:
        raise FileNotFoundError(
            f"tfds:{name}: no prepared set in {root}; prepare it there with "
            "tfds.builder(NAME, file_format='array_record').download_and_prepare()"
        )
    if len(found) > 1:
        raise ValueError(
            f"tfds:{name} matches several sets; use tfds:DIRECTORY with one of {', '.join(map(str, found))}"
        )
    return found[0]
