"""Checkpoints: the only file that knows Orbax.

One checkpoint holds five items: params, ema, optimizer (its state and the step), data (the position in the
data), config. Sampling reads ema alone. A checkpoint gets its own name only when it is whole, so one that was
broken off is not seen.
"""

import contextlib
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from instaflow_jax.arrays import Params
from instaflow_jax.infra import devices

ARRAYS = ("params", "ema", "optimizer")


class Checkpoints:
    """Saves and restores training states under one directory; writing goes on while training continues.

    Args:
      directory: on a disk that all processes share.
      keep_last: how many of the newest checkpoints stay.
      keep_every: checkpoints at multiples of this step stay for ever; 0 for none.
    """

    def __init__(self, directory: str | Path, *, keep_last: int, keep_every: int):
        if keep_last < 1:
            raise ValueError(f"keep_last={keep_last} must be 1 or more: resuming needs the newest checkpoint")
        logging.getLogger("absl").addFilter(_worth_telling)
        self._directory = Path(directory).absolute()
        policies = ocp.checkpoint_managers
        keep = [policies.LatestN(keep_last)] + ([policies.EveryNSteps(keep_every)] if keep_every else [])
        _clear_broken_off(self._directory)
        options = ocp.CheckpointManagerOptions(preservation_policy=policies.AnyPreservationPolicy(keep))
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def latest(self) -> int | None:
        """The newest whole checkpoint's step, None where there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: PyTree, position: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        """Starts to save; returns when the arrays are copied, so that they may be donated.

        Args:
          state: a TrainState.
          position: of the data, after the last batch used and before the next; JSON.
          config: the resolved config; JSON.

        Raises:
          OSError: this or the previous checkpoint could not be written; older ones are untouched.
        """
        arrays = {name: ocp.args.StandardSave(item) for name, item in _items(state).items()}
        data = {"data": ocp.args.JsonSave(dict(position)), "config": ocp.args.JsonSave(dict(config))}
        with self._explained():
            self._manager.save(step, args=ocp.args.Composite(**arrays, **data), force=True)

    def check(self) -> None:
        """Raises OSError if writing in the background has failed by now."""
        with self._explained():
            self._manager.check_for_errors()

    def restore(self, like: PyTree) -> tuple[PyTree, dict[str, Any]]:
        """The newest state, straight into shards, and the position in the data.

        Args:
          like: the TrainState wanted, as arrays or as ShapeDtypeStructs with shardings.

        Raises:
          FileNotFoundError: no checkpoint yet.
          ValueError: names, shapes or dtypes differ from those saved.
        """
        path = _step_path(self._directory, None)
        loaded = {name: _load_arrays(path / name, item) for name, item in _items(like).items()}
        return _state(like, loaded), _load_json(path / "data")

    def wait(self) -> None:
        """Waits until the last checkpoint is written. Raises OSError if that failed."""
        with self._explained():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and ends the threads."""
        with self._explained():
            self._manager.close()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """One message for a failed write, which the file system tells as OSError, tensorstore as ValueError."""
        try:
            yield
        except (OSError, ValueError) as error:
            if isinstance(error, ValueError) and "os_error_code" not in str(error):
                raise
            raise OSError(
                f"a checkpoint could not be written to {self._directory}; those of steps "
                f"{whole_steps(self._directory)} are whole. Free some space and run again: training goes on from "
                f"the newest. The system said: {str(error).split(' [')[0]}"
            ) from None


def _clear_broken_off(directory: Path) -> None:
    """Removes what a kill left half-written. (Orbax would, but in the background, where it can meet the next save.)"""
    if jax.process_index() == 0:
        for left in directory.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(left, ignore_errors=True)  # its writer may not have died yet
    devices.barrier("broken-off checkpoints cleared")


def _worth_telling(record: logging.LogRecord) -> bool:
    """Of Orbax's log the warnings alone: the rest is chatter, or tracebacks of what is raised here as well."""
    return "orbax" not in record.pathname or record.levelno == logging.WARNING


def load_ema(directory: str | Path, mesh: Mesh, *, step: int | None, like: Params | None) -> Params:
    """The running mean of one checkpoint; see `load_weights`."""
    return load_weights(directory, "ema", mesh, step=step, like=like)


def load_weights(directory: str | Path, item: str, mesh: Mesh, *, step: int | None, like: Params | None) -> Params:
    """The weights of one checkpoint, straight into shards; reads nothing else of it.

    Args:
      item: "ema", the running mean, or "params".
      step: which checkpoint, None for the newest.
      like: names, shapes and dtypes wanted, None to take what is there.

    Raises:
      FileNotFoundError: no such checkpoint.
      ValueError: names, shapes or dtypes differ from those saved.
    """
    path = _step_path(Path(directory), step) / item
    return _load_arrays(path, devices.abstract(_saved(path) if like is None else like, mesh))


def save_weights(directory: str | Path, weights: Mapping[str, Params]) -> None:
    """Weights of networks by name, alone and as host arrays, so that no device layout comes along.

    `orbax.checkpoint.StandardCheckpointer().restore(absolute path)` gives them back on any machine.
    """
    logging.getLogger("absl").addFilter(_worth_telling)
    with contextlib.closing(ocp.StandardCheckpointer()) as checkpointer:
        checkpointer.save(Path(directory).absolute(), jax.tree.map(np.asarray, dict(weights)))


def load_config(directory: str | Path, *, step: int | None) -> dict[str, Any]:
    """The resolved config that a checkpoint was trained with. Raises FileNotFoundError if there is none."""
    return _load_json(_step_path(Path(directory), step) / "config")


def whole_steps(directory: str | Path) -> list[int]:
    """Steps of the checkpoints in a directory, oldest first; half-written ones have other names."""
    found = Path(directory).glob("*")
    return sorted(int(path.name) for path in found if path.name.isdigit())


def _step_path(directory: Path, step: int | None) -> Path:
    steps = whole_steps(directory)
    wanted = steps[-1] if step is None and steps else step
    if wanted not in steps:
        raise FileNotFoundError(
            f"{directory} has no checkpoint {'yet' if step is None else f'of step {step}, only of {steps}'}: "
            "train first, or name another workdir"
        )
    return (directory / str(wanted)).absolute()


def _items(state: PyTree) -> dict[str, Params]:
    """The array items as flat dictionaries, whatever optax's classes are called in this version."""
    optimizer = {"step": state.step, "opt_state": state.opt_state}
    named, _ = jax.tree_util.tree_flatten_with_path(optimizer)
    flat = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in named}
    return {"params": state.params, "ema": state.ema, "optimizer": flat}


def _state(like: PyTree, items: Mapping[str, Params]) -> PyTree:
    """The inverse of `_items`."""
    leaves = [items["optimizer"][name] for name in _items(like)["optimizer"]]
    structure = jax.tree.structure({"step": like.step, "opt_state": like.opt_state})
    rest = jax.tree.unflatten(structure, leaves)
    return type(like)(params=items["params"], ema=items["ema"], **rest)


def _saved(path: Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of an item on disk, by name."""
    with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
        found = dict(handler.metadata(path).tree)
    return {name: jax.ShapeDtypeStruct(saved.shape, saved.dtype) for name, saved in found.items()}


def _load_arrays(path: Path, like: Mapping[str, Array | jax.ShapeDtypeStruct]) -> Params:
    check_match(str(path), _saved(path), like)
    wanted = {name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding) for name, a in like.items()}
    with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
        return handler.restore(path, args=ocp.args.StandardRestore(wanted))


def _load_json(path: Path) -> dict[str, Any]:
    with contextlib.closing(ocp.JsonCheckpointHandler()) as handler:
        return handler.restore(path)


def check_match(source: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuses arrays that are not exactly those wanted: weights match or nothing loads.

    Raises:
      ValueError: naming every array that is missing, not wanted, or of another shape or dtype.
    """
    wrong = [f"missing: {name}" for name in wanted if name not in found]
    wrong += [f"not wanted: {name}" for name in found if name not in wanted]
    for name in wanted.keys() & found.keys():
        saved, asked = (f"{tuple(a.shape)} {np.dtype(a.dtype).name}" for a in (found[name], wanted[name]))
        if saved != asked:
            wrong.append(f"{name}: saved {saved}, wanted {asked}")
    if wrong:
        raise ValueError(
            f"the arrays of {source} are not those asked for; use the config they were trained with, or another "
            "workdir:\n  " + "\n  ".join(sorted(wrong))
        )
