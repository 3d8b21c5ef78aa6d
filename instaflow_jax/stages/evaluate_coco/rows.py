"""The rows of the table: `config.model`, and the models that `config.extra` adds."""

import dataclasses
import re
from pathlib import PurePath
from typing import Any

from ml_collections import ConfigDict

from instaflow_jax import sampling, solvers
from instaflow_jax.stages.common.loading import (
    EXPORT,
    SolveOptions,
    WeightOptions,
    read_solve_options,
    read_weight_options,
)
from instaflow_jax.stages.common.ranges import check_ranges

FIELDS = {"N": int, "alpha": float, "solver": str, "dynamics": str}  # what a part of `config.extra` may change
CHOICES = {"solver": ("auto", *solvers.FLOW_SOLVERS, *solvers.TEACHER_SOLVERS), "dynamics": sampling.DYNAMICS}


@dataclasses.dataclass(frozen=True)
class Options:
    """What is drawn for a row and how; see `configs/evaluate_coco.py`."""

    model: str
    weights: WeightOptions
    solving: SolveOptions
    size: int
    seed: int
    batch: int


def read(config: ConfigDict) -> list[Options]:
    """The rows: `config.model` as the config says, then one for each part of `config.extra`, 'MODEL,N=25,alpha=1.5'.

    What a part leaves out is as in the config, but `config.delta` and `config.loras` change `config.model` alone.

    Raises:
      ValueError: a field is out of range; a part is malformed, or is the same row or has the same folder as another.
    """
    rows = [read_options(config)]
    for part in config.extra.split("|") if config.extra else ():
        try:
            row = read_options(_read_part(config, part))
            _check_new(row, rows)
        except ValueError as error:
            raise ValueError(f"config.extra={config.extra!r}: {part!r}: {error}") from error
        rows.append(row)
    return rows


def read_options(config: ConfigDict) -> Options:
    """One row's config as values, checked before anything is loaded. Raises ValueError."""
    check_ranges(config)
    fields = {name: config[name] for name in ("model", "size", "seed", "batch")}
    return Options(weights=read_weight_options(config), solving=read_solve_options(config), **fields)


def folder(row: Options) -> str:
    """The folder of a row of `config.extra`: "runs_reflow_N25_alpha1.5" for the model runs/reflow/export."""
    model = [name for name in PurePath(row.model).parts if name != EXPORT][-2:]
    solver = [] if row.solving.solver == "auto" else [row.solving.solver]
    name = "_".join([*model, f"N{row.solving.N}", f"alpha{row.solving.alpha:g}", *solver])
    return re.sub(r"[^\w.-]+", "_", name).lstrip("_.-")


def _read_part(config: ConfigDict, part: str) -> ConfigDict:
    """The config of one part of `config.extra`."""
    model, *changes = (word.strip() for word in part.split(","))
    if not model or "=" in model:
        raise ValueError("write MODEL, or MODEL,N=25,alpha=1.5")
    fields: dict[str, Any] = {}
    for change in changes:
        name, _, text = (word.strip() for word in change.partition("="))
        if name not in FIELDS or name in fields:
            raise ValueError(f"{change!r} is not one of {', '.join(f'{name}=…' for name in FIELDS)}, each at most once")
        try:
            fields[name] = FIELDS[name](text)
        except ValueError as error:
            raise ValueError(f"{change!r} is not like N=25 or alpha=1.5") from error
        if text not in CHOICES.get(name, (text,)):
            raise ValueError(f"{change!r} is not one of {', '.join(CHOICES[name])}")
    row = config.copy_and_resolve_references()
    row.update({"model": model, "loras": "", "delta": {"custom": ""}, **fields})
    return row


def _check_new(row: Options, rows: list[Options]) -> None:
    """Raises ValueError if a row, or the folder of a row of `config.extra`, is there already."""
    if row in rows:
        raise ValueError("the table has this row already; leave one of them out")
    if folder(row).lower() in (folder(other).lower() for other in rows[1:]):  # some file systems ignore case
        raise ValueError(f"another row has the folder {folder(row)} too; evaluate this one in another --workdir")
