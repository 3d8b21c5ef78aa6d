"""Checkpoints; the only file that imports Orbax.

A checkpoint holds five items: params, ema, optimizer (its state, the step and whatever else a state has, such as a
second network), data (the position in it) and config. Sampling reads ema only. Beside them, checksums.json holds the
SHA-256 of each file, which reading compares; checkpoints of version 0.1 have none. A checkpoint gets its final name
when it is complete, so an interrupted save is never read.

In a bucket, a checkpoint is complete when it has the object commit_success.txt. Orbax itself writes and reads gs://,
from all processes, without checksums.json. Elsewhere, which Orbax does not know, one process writes a checkpoint to its
disk, uploads it as a whole, and downloads it as a whole.
"""

import contextlib
import dataclasses
import logging
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh
from jaxtyping import PyTree

from instaflow_jax.arrays import AnyArray, Params
from instaflow_jax.infra import buckets, devices, files, stores
from instaflow_jax.infra.files import as_os_error, format_bytes, naming
from instaflow_jax.infra.messages import first_ten

_INCOMPLETE = "*.orbax-checkpoint-tmp*"
ITEMS = ("params", "ema", "optimizer", "data", "config")
Leaves = Mapping[str, AnyArray | jax.ShapeDtypeStruct]
AnyPath = Path | epath.Path
_COMMITTED = "commit_success.txt"  # Orbax's name for it


class Checkpoints:
    """Saves and restores training states in one directory; files are written in the background.

    Args:
      directory: on a disk that all processes share, or in the mirror of a bucket.
      keep_last: number of newest checkpoints to keep.
      keep_every: keeps checkpoints at multiples of this step for ever; 0 keeps none.
      verify: whether `restore` reads all files once more to compare their checksums.
    """

    def __init__(self, directory: str | Path, *, keep_last: int, keep_every: int, verify: bool = True):
        if keep_last < 1:
            raise ValueError(f"keep_last={keep_last} must be 1 or more: resuming needs the newest checkpoint")
        _quiet_orbax()
        check_place(directory)
        self._local, self._verify, self._keep = Path(directory).absolute(), verify, (keep_last, keep_every)
        self._directory = _orbax_path(self._local)
        _remove_incomplete(self._local)
        if steps := complete_steps(self._local):
            _fetch(self._local / str(steps[-1]))
        policies = ocp.checkpoint_managers
        keep = [policies.LatestN(keep_last)] + ([policies.EveryNSteps(keep_every)] if keep_every else [])
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(keep),
            async_options=ocp.AsyncOptions(post_finalization_callback=self._finish),
        )
        self._manager = ocp.CheckpointManager(self._directory, options=options)
        self._size = 0  # bytes of the last checkpoint that was begun

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint, or None if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: PyTree, position: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        """Starts saving; returns when the arrays are copied, so that the caller may donate them.

        Args:
          state: a TrainState.
          position: of the data, after the last batch used and before the next; JSON.
          config: the resolved config; JSON.

        Raises:
          OSError: this or the previous checkpoint could not be written; older ones are untouched.
        """
        arrays = {name: ocp.args.StandardSave(item) for name, item in _items(state).items()}
        data = {"data": ocp.args.JsonSave(dict(position)), "config": ocp.args.JsonSave(dict(config))}
        self._size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        with self._explain_errors():
            self._manager.save(step, args=ocp.args.Composite(**arrays, **data), force=True)

    def _finish(self) -> None:
        """Orbax calls this in the background, before it gives the checkpoint its final name on a disk."""
        if jax.process_index() == 0 and not _is_remote(self._directory):
            for path in self._local.glob(_INCOMPLETE):
                files.write_checksums(path, parts=ITEMS)
                _upload(path, *self._keep)

    def check(self) -> None:
        """Raises OSError if writing in the background has failed by now."""
        with self._explain_errors():
            self._manager.check_for_errors()

    def check_newest(self, like: PyTree) -> None:
        """Raises ValueError if the newest checkpoint, if there is one, holds other parameters than `restore` expects.

        The rest of the state takes four times as long to compare; `restore` does that, beside the compiler.
        """
        if self.latest() is not None:
            _check_arrays(_step_path(self._local, None) / "params", like.params)

    def restore(self, like: PyTree) -> tuple[PyTree, dict[str, Any]]:
        """The newest state, read straight into shards, and the position in the data.

        Args:
          like: the expected TrainState, as arrays or as ShapeDtypeStructs with shardings.

        Raises:
          FileNotFoundError: there is no checkpoint yet.
          ValueError: a file is damaged, or names, shapes or dtypes differ from those saved.
        """
        path = _step_path(self._local, None)
        if self._verify:
            _check_files(path, ITEMS)
        loaded = {name: _load_arrays(path / name, item) for name, item in _items(like).items()}
        return _state(like, loaded), _load_json(path / "data")

    def wait(self) -> None:
        """Waits until the last checkpoint is written. Raises OSError if that failed."""
        with self._explain_errors():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then ends the background threads."""
        with self._explain_errors():
            self._manager.close()

    @contextlib.contextmanager
    def _explain_errors(self) -> Iterator[None]:
        """Turns a failed write into one OSError; the file system raises OSError, tensorstore ValueError."""
        if _is_remote(self._directory):
            with buckets.explain(f"write a checkpoint to {self._directory}"):
                yield
            return
        try:
            yield
        except (OSError, ValueError) as error:
            if isinstance(error, ValueError) and "os_error_code" not in str(error):
                raise
            raise OSError(
                f"cannot write a checkpoint of {format_bytes(self._size)} to {self._directory}; the checkpoints of "
                f"steps {complete_steps(self._local)} are complete. Free some space and run again: training "
                f"resumes from the newest. The system reported: {str(error).split(' [')[0]}"
            ) from None


def load_weights(
    directory: str | Path, item: str, mesh: Mesh, *, step: int | None, like: Leaves | None, verify: bool = True
) -> Params:
    """The weights of one checkpoint, straight into shards; no other item is read.

    Args:
      item: "ema" or "params".
      step: step of the checkpoint; None for the newest.
      like: expected names, shapes and dtypes; None accepts what is saved.
      verify: whether to compare the files' checksums first.

    Raises:
      FileNotFoundError: there is no such checkpoint.
      ValueError: a file is damaged, or names, shapes or dtypes differ from those saved.
    """
    _quiet_orbax()
    path = _step_path(Path(directory), step)
    if verify:
        _check_files(path, (item,))
    path /= item
    return _load_arrays(path, devices.abstract(_saved(path) if like is None else like, mesh))


def save_weights(directory: str | Path, weights: Mapping[str, Params]) -> None:
    """Saves the weights of several networks, by name, as host arrays, so that any machine can read them.

    `orbax.checkpoint.StandardCheckpointer().restore(absolute path)` reads them back.
    """
    _quiet_orbax()
    arrays = jax.tree.map(np.asarray, dict(weights))
    size = sum(array.nbytes for array in jax.tree.leaves(arrays))
    checkpointer = ocp.StandardCheckpointer()
    with naming(directory, size), as_os_error(ValueError), contextlib.closing(checkpointer):
        checkpointer.save(Path(directory).absolute(), arrays)


def load_config(directory: str | Path, *, step: int | None) -> dict[str, Any]:
    """The resolved config that a checkpoint was trained with.

    Raises:
      FileNotFoundError: there is no such checkpoint.
      ValueError: the file is damaged.
    """
    path = _step_path(Path(directory), step)
    _check_files(path, ("config",))
    return _load_json(path / "config")


def complete_steps(directory: str | Path) -> list[int]:
    """Steps of the complete checkpoints in a directory, oldest first; incomplete ones have other names or no marker."""
    found = stores.mirror_of(directory)
    if found is None:
        return sorted(int(path.name) for path in Path(directory).glob("*") if path.name.isdigit())
    names = [name.removeprefix(f"{found[1]}/") for name in found[0].bucket.list(found[1])]
    return sorted(int(match[1]) for name in names if (match := re.fullmatch(rf"(\d+)/{_COMMITTED}", name)))


def has_checkpoints(directory: Path) -> bool:
    """Whether training has begun in a directory, even if no checkpoint is complete."""
    return directory.is_dir() or (stores.mirror_of(directory) is not None and bool(complete_steps(directory)))


def check_place(directory: str | Path) -> None:
    """Raises ValueError if several processes would write to a bucket that Orbax cannot write to by itself."""
    if jax.process_count() > 1 and stores.mirror_of(directory) and not _is_remote(_orbax_path(Path(directory))):
        raise ValueError(
            f"{stores.address(directory)}: several processes can save checkpoints only in gs:// or on a disk that they "
            "share; use such a --workdir"
        )


def check_match(source: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Checks that saved arrays are exactly the expected ones: weights match or nothing loads.

    Raises:
      ValueError: lists arrays that are missing, unexpected, or of another shape or dtype: the first ten.
    """
    wrong = [f"missing: {name}" for name in wanted if name not in found]
    wrong += [f"unexpected: {name}" for name in found if name not in wanted]
    for name in wanted.keys() & found.keys():
        saved, expected = (f"{tuple(a.shape)} {np.dtype(a.dtype).name}" for a in (found[name], wanted[name]))
        if saved != expected:
            wrong.append(f"{name}: saved {saved}, expected {expected}")
    if wrong:
        raise ValueError(
            f"the arrays of {source} are not the expected ones; use the config they were trained with, or another "
            f"workdir: {first_ten(sorted(wrong), '; ')}"
        )


def _quiet_orbax() -> None:
    """Keeps only the warnings of Orbax's log: its errors are also raised, and the rest is noise."""
    logging.getLogger("absl").addFilter(_is_useful)


def _is_useful(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname or record.levelno == logging.WARNING


def _remove_incomplete(directory: Path) -> None:
    """Deletes incomplete checkpoints of killed runs. Orbax does so too, but in the background of the next save."""
    if jax.process_index() == 0:
        for path in directory.glob(_INCOMPLETE):
            shutil.rmtree(path, ignore_errors=True)  # the killed process may still be writing
        _delete_all_but(directory, complete_steps(directory))
    devices.barrier("incomplete checkpoints removed")


def _orbax_path(directory: Path) -> AnyPath:
    """Where Orbax writes: the address of a gs:// bucket, or a path of this machine."""
    address = stores.address(directory)
    if not address.startswith("gs://"):
        return directory.absolute()
    return epath.Path(address)


def _is_remote(path: AnyPath) -> bool:
    return not isinstance(path, Path)


def _fetch(path: Path) -> None:
    """Downloads a checkpoint that Orbax cannot read where it is."""
    if not _is_remote(_orbax_path(path)):
        stores.fetch(path)


def _upload(path: Path, keep_last: int, keep_every: int) -> None:
    """Uploads a checkpoint that has not got its final name yet, and deletes those that are no longer kept."""
    found = stores.mirror_of(path.parent)
    if found is None:
        return
    mirror, folder = found
    mirror.upload_folder(path, f"{folder}/{path.name.partition('.')[0]}", _COMMITTED)
    steps = complete_steps(path.parent)
    kept = [step for step in steps if step in steps[-keep_last:] or (keep_every and step % keep_every == 0)]
    _delete_all_but(path.parent, kept)


def _delete_all_but(directory: Path, steps: Collection[int]) -> None:
    """Deletes the other checkpoints of a bucket, their markers first."""
    found = stores.mirror_of(directory)
    if found is None:
        return
    mirror, folder = found
    names = [name for name in mirror.bucket.list(folder) if name.removeprefix(f"{folder}/").partition("/")[0].isdigit()]
    gone = [name for name in names if int(name.removeprefix(f"{folder}/").partition("/")[0]) not in steps]
    mirror.delete(sorted(gone, key=lambda name: not name.endswith(f"/{_COMMITTED}")))


def _step_path(directory: Path, step: int | None) -> AnyPath:
    steps = complete_steps(directory)
    wanted = steps[-1] if step is None and steps else step
    if wanted not in steps:
        raise FileNotFoundError(
            f"{directory} has no checkpoint {'yet' if step is None else f'of step {step}, only of {steps}'}: "
            "train first, or use another workdir"
        )
    _fetch(directory / str(wanted))
    return _orbax_path(directory / str(wanted))


def _check_files(path: AnyPath, items: Collection[str]) -> None:
    """Compares the checksums of one checkpoint. Raises ValueError naming a damaged file and the newest other step."""
    if _is_remote(path):
        return
    damage = files.find_damage(path, parts=items)
    if damage is None:
        return
    others = [step for step in reversed(complete_steps(path.parent)) if step != int(path.name)]
    whole = next((step for step in others if files.find_damage(path.parent / str(step)) is None), None)
    if whole is None:
        raise ValueError(
            f"{damage}, and no other checkpoint is undamaged: use another workdir, or delete {path.parent}"
        )
    raise ValueError(
        f"{damage}; the newest undamaged checkpoint is that of step {whole}: delete {path} to use that one"
    )


def _items(state: PyTree) -> dict[str, Leaves]:
    """The array items as flat dictionaries, so that files do not depend on the names of optax's classes."""
    named, _ = jax.tree_util.tree_flatten_with_path(_rest(state))
    flat = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in named}
    return {"params": state.params, "ema": state.ema, "optimizer": flat}


def _rest(state: PyTree) -> dict[str, PyTree]:
    """The fields of a state that are not items of their own, by name."""
    names = [field.name for field in dataclasses.fields(state) if field.name not in ("params", "ema")]
    return {name: getattr(state, name) for name in names}


def _state(like: PyTree, items: Mapping[str, Leaves]) -> PyTree:
    """The inverse of `_items`."""
    leaves = [items["optimizer"][name] for name in _items(like)["optimizer"]]
    rest = jax.tree.unflatten(jax.tree.structure(_rest(like)), leaves)
    return type(like)(params=items["params"], ema=items["ema"], **rest)


def _saved(path: AnyPath) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a saved item, by name."""
    with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
        found = dict(handler.metadata(path).tree)
    return {name: jax.ShapeDtypeStruct(saved.shape, saved.dtype) for name, saved in found.items()}


def _check_arrays(path: AnyPath, like: Leaves) -> None:
    """`check_match` of a saved item; of its metadata alone, so it is quick."""
    check_match(str(path), _saved(path), like)


def _load_arrays(path: AnyPath, like: Leaves) -> Params:
    _check_arrays(path, like)
    wanted = {name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding) for name, a in like.items()}
    with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
        return handler.restore(path, args=ocp.args.StandardRestore(wanted))


def _load_json(path: AnyPath) -> dict[str, Any]:
    with contextlib.closing(ocp.JsonCheckpointHandler()) as handler:
        return handler.restore(path)
