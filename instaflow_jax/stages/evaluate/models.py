"""The models that `evaluate` compares: the teacher, and the flows that training left in the workdir."""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from instaflow_jax import pipeline, sampling
from instaflow_jax.data.pairs import manifest as pairs_manifest
from instaflow_jax.infra import files
from instaflow_jax.solvers import Multistep
from instaflow_jax.stages.common import loading
from instaflow_jax.stages.common.loading import EXPORT, PAIRS

TITLES = {
    "teacher": "teacher",
    "reflow": "2-RF",
    "distill": "reflow + distil",
    "distill_lpips": "reflow + distil + LPIPS",
    "direct": "direct distil",
    "refine": "reflow + refine",
    "consistency": "reflow + consistency",
    "stacked": "reflow + distil, stacked",
    "stacked_lpips": "reflow + distil + LPIPS, stacked",
    "stacked_direct": "direct distil, stacked",
}
NO_MODELS = ("real", "decoded")  # rows of the table that belong to no model
FLOWS = ("reflow", "distill", "distill_lpips", "direct")  # folders of the workdir, each with export/
FEW_STEPS = ("refine", "consistency")  # evaluated like distill
STACKED = ("stacked", "stacked_lpips", "stacked_direct")  # of Stacked U-Nets
_REFLOW = re.compile(r"reflow_([1-9]\d*)")  # the k-rectified flow, k > 2
_PROGRESSIVE = re.compile(r"progressive_([1-9]\d*)")  # the flow that progressive distillation made for N steps


class Entry(NamedTuple):
    """A model to load: where it is, its guidance, and the numbers of solver steps to evaluate it at."""

    name: str
    source: str  # embedded name, directory or hub id
    alpha: float
    N: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Model:
    """One model under evaluation.

    Attributes:
      name: "teacher", or the folder of the workdir that it was trained in.
      alpha: its guidance.
      N: the numbers of solver steps that it is evaluated at.
      weights: SHA-256 of the weights of all its networks.
    """

    name: str
    pipe: pipeline.Pipeline
    dynamics: sampling.Dynamics
    alpha: float
    N: tuple[int, ...]
    weights: str

    @property
    def title(self) -> str:
        return make_title(self.name)

    def table(self, N: int) -> Multistep:
        """Its solver's table: DPM-Solver for a teacher, Euler for a flow."""
        return sampling.solver_table(self.dynamics, "auto", N)


def make_title(name: str) -> str:
    """What a model is called in the table: the folder's own name if it has no meaning."""
    if _REFLOW.fullmatch(name):
        return f"{count_reflows(name)}-RF"
    return "progressive" if _PROGRESSIVE.fullmatch(name) else TITLES.get(name, name)


def count_reflows(name: str) -> int | None:
    """k if the model is k-rectified: 1 for the teacher, 2 after a reflow; None for other models."""
    later = _REFLOW.fullmatch(name)
    return int(later[1]) if later else {"teacher": 1, "reflow": 2}.get(name)


def count_steps(name: str) -> int | None:
    """The steps that progressive distillation made the flow in this folder for; None for other folders."""
    found = _PROGRESSIVE.fullmatch(name)
    return int(found[1]) if found else None


def find_flows(workdir: Path) -> tuple[str, ...]:
    """`FLOWS`, and what is exported of later reflows (k rises), `FEW_STEPS`, `STACKED` and progressive distillation (N
    falls).
    """
    names = [path.name for path in workdir.glob("*") if loading.has_export(path)]
    reflows = sorted((k, name) for name in names if (k := count_reflows(name) or 0) > 2)
    rounds = sorted(((N, name) for name in names if (N := count_steps(name))), reverse=True)
    others = (name for name in (*FEW_STEPS, *STACKED) if name in names)
    return FLOWS[0], *(name for _, name in reflows), *FLOWS[1:], *others, *(name for _, name in rounds)


def load(entries: Sequence[Entry]) -> list[Model]:
    """Loads the models; the first is the teacher.

    Raises:
      ValueError, FileNotFoundError: a model cannot be read, or its networks differ from the teacher's.
    """
    models = []
    for name, source, alpha, N in entries:
        pipe = loading.load(source, loading.WeightOptions())
        dynamics = sampling.read_dynamics(pipe.scheduler, pipe.index, "auto")
        digests = {part: files.sha256_of_params(params) for part, params in pipe.params.items()}
        models.append(Model(name, pipe, dynamics, alpha, N, files.sha256_of_json(digests)))
        _check_same_networks(models[0], models[-1], source)
    return models


def _check_same_networks(teacher: Model, model: Model, source: str) -> None:
    """The models' networks have one architecture, but a U-Net may be two such U-Nets in series."""
    for part, net in teacher.pipe.nets.items():
        config, other = (getattr(net.config, "half", net.config) for net in (net, model.pipe.nets[part]))
        if config != other:
            raise ValueError(
                f"{source}/{part} differs from the teacher's network; evaluate this model in a workdir of its own, "
                "with --config.teacher.model naming its teacher"
            )


def is_there(workdir: Path, name: str) -> bool:
    """Whether training has exported a flow to `workdir`/`name`/export.

    Raises:
      FileNotFoundError: it has not, and `name` is not one of the flows that may be missing.
    """
    source = workdir / name / EXPORT
    if loading.has_export(workdir / name):
        return True
    if name not in FLOWS:
        raise FileNotFoundError(
            f"{source}, from config.extra, holds no model; train it with "
            f"--config=configs/distill.py --config.output={name}"
        )
    print(f"{source} does not exist: the table goes without {TITLES[name]}", flush=True)
    return False


def split_extra(extra: str) -> tuple[str, ...]:
    """Folders of the workdir from 'NAME|NAME'.

    Raises:
      ValueError: a name is empty, repeated, or already has a meaning.
    """
    names = tuple(extra.split("|")) if extra else ()
    taken = (*TITLES, *NO_MODELS)
    for i, name in enumerate(names):
        if name in ("", *taken, *names[:i]) or make_title(name) != name:
            raise ValueError(
                f"config.extra={extra!r}: {name!r} is empty, repeated, or one of {', '.join(taken)}, which "
                "are evaluated anyway; name other folders of the workdir, NAME|NAME"
            )
    return names


def alpha_of_pairs(workdir: Path) -> float:
    """The guidance that the teacher made its pairs with. Raises FileNotFoundError if there are none."""
    directory = workdir / PAIRS
    if not (directory / pairs_manifest.MANIFEST).is_file():
        raise FileNotFoundError(
            f"{directory} holds no pairs, which would give the teacher's guidance; set --config.teacher.alpha, or make "
            "pairs with configs/generate.py"
        )
    return float(pairs_manifest.read(directory)["recipe"]["alpha"])


def check_seeds(seed: int, folders: Iterable[Path]) -> None:
    """Raises ValueError if pairs in a folder were made from a seed of the evaluation, `seed` to `seed + 2`."""
    for directory in (folder / PAIRS for folder in folders):
        there = (directory / pairs_manifest.MANIFEST).is_file()
        used = pairs_manifest.read(directory)["recipe"]["seed"] if there else None
        if used in range(seed, seed + 3):
            raise ValueError(
                f"config.seed={seed} and the two seeds after it must not be {used}, the seed of the training pairs in "
                f"{directory}; use another seed"
            )
