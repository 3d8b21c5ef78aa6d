"""ArrayRecord shards that TFDS opens, written without TensorFlow."""

import os
from collections.abc import Iterable
from pathlib import Path

# One record a chunk, for random access. What we store (PNG, noise, latents) does not compress.
_OPTIONS = "group_size:1,uncompressed"


def stable(record: bytes) -> bytes:
    """The same record with its fields in a fixed order, which protobuf by itself changes from process to process."""
    from tensorflow_datasets.proto import tf_example_pb2

    return tf_example_pb2.Example.FromString(record).SerializeToString(deterministic=True)


def write(path: Path, records: Iterable[bytes]) -> None:
    """Writes one shard, each record readable by itself, and waits until the disk has it.

    Raises:
      OSError: the disk took no more; names the file and the reason. What was written so far stays under `path`.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = _on_disk(path, ArrayRecordWriter, str(path), _OPTIONS)
    try:
        for record in records:
            _on_disk(path, writer.write, record)
        _on_disk(path, writer.close)
    except BaseException:
        _give_up(writer)
        raise
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _on_disk(path: Path, act, *arguments):
    """array_record reports everything as RuntimeError; only what it says about this file is one of the disk."""
    try:
        return act(*arguments)
    except RuntimeError as error:
        raise OSError(f"cannot write {path}: {error}") from error


def _give_up(writer) -> None:
    try:
        writer.close()
    except RuntimeError:  # of the same full disk
        return


def template(directory: Path, name: str, split: str):
    """How TFDS names the shards of a split: NAME-SPLIT.array_record-00000-of-00001."""
    import tensorflow_datasets as tfds

    return tfds.core.ShardedFileTemplate(
        data_dir=directory, dataset_name=name, filetype_suffix="array_record", split=split
    )


def write_metadata(directory: Path, name: str, features, splits: dict[str, list[tuple[int, int]]], **about) -> None:
    """What `tfds.builder_from_directory(directory)` needs beside the shards.

    Args:
      splits: (records, bytes) of every shard, by split.
      about: description, version, license, homepage.
    """
    import tensorflow_datasets as tfds

    infos = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=[count for count, _ in shards],
            num_bytes=sum(size for _, size in shards),
            filename_template=template(directory, name, split),
        )
        for split, shards in splits.items()
    ]
    tfds.folder_dataset.write_metadata(
        data_dir=directory,
        features=features,
        split_infos=infos,
        check_data=False,
        filename_template=tfds.core.ShardedFileTemplate(
            data_dir=directory, dataset_name=name, filetype_suffix="array_record"
        ),
        **about,
    )
