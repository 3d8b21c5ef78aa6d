"""Who is judged by `evaluate`: the teacher, and the flows that the training stages left in the workdir."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from instaflow_jax import pipeline, sampling
from instaflow_jax.data.pairs import manifest as pairs_manifest
from instaflow_jax.infra import files
from instaflow_jax.solvers import Multistep
from instaflow_jax.stages.common import flow_training as straighten
from instaflow_jax.stages.generate import stage as generate

TITLES = {
    "teacher": "teacher",
    "reflow": "2-RF",
    "distill": "reflow + distil",
    "distill_lpips": "reflow + distil + LPIPS",
    "direct": "direct distil",
}
NO_MODELS = ("real", "decoded")  # rows of the table that are no model's
FLOWS = ("reflow", "distill", "distill_lpips", "direct")  # folders of the workdir, each with export/


@dataclasses.dataclass(frozen=True)
class Model:
    """One contestant.

    Attributes:
      name: "teacher", or the folder of the workdir that it was trained in.
      alpha: its guidance.
      steps: the numbers of solver steps that it is judged at.
      weights: SHA-256 of all its networks' weights.
    """

    name: str
    pipe: pipeline.Pipeline
    dynamics: sampling.Dynamics
    alpha: float
    steps: tuple[int, ...]
    weights: str

    @property
    def title(self) -> str:
        return TITLES.get(self.name, self.name)

    def table(self, N: int) -> Multistep:
        """Its solver as numbers: DPM-Solver for a teacher, Euler for a flow."""
        return sampling.solver_table(self.dynamics, "auto", N)


def load(config: ConfigDict, workdir: Path) -> list[Model]:
    """The teacher, each flow that is there, and those that `config.extra` names; tells which of the flows are not there.

    Raises:
      ValueError, FileNotFoundError: a model cannot be read, is of other networks than the teacher, a folder of
        `config.extra` holds none, or nothing tells the teacher's guidance.
    """
    models = [
        _read("teacher", config.teacher.model, config.teacher.alpha or _alpha_of_pairs(workdir), config.teacher.N)
    ]
    for name in folders(config):
        source, how = workdir / name / straighten.EXPORT, config[name if name in FLOWS else "distill"]
        if (source / "model_index.json").is_file():
            models.append(_read(name, str(source), how.alpha, how.N))
            _check_same_networks(models[0], models[-1], source)
        elif name not in FLOWS:
            raise FileNotFoundError(
                f"{source}, which config.extra={config.extra!r} asks for, holds no model: train it with "
                f"--config=configs/distill.py --config.output={name}"
            )
        else:
            print(f"{source} is not there: the table goes without {TITLES[name]}", flush=True)
    return models


def folders(config: ConfigDict) -> tuple[str, ...]:
    """Of the workdir, in which to look for flows.

    Raises:
      ValueError: a name of `config.extra` stands for something else, or twice.
    """
    also = tuple(config.extra.split("|")) if config.extra else ()
    taken = (*TITLES, *NO_MODELS)
    for i, name in enumerate(also):
        if not name or name in (*taken, *also[:i]):
            raise ValueError(
                f"config.extra={config.extra!r}: {name!r} is empty, there twice, or one of {', '.join(taken)}, "
                "which are judged anyhow; name other folders of the workdir, NAME|NAME"
            )
    return *FLOWS, *also


def _read(name: str, source: str, alpha: float, steps: Sequence[int]) -> Model:
    pipe = pipeline.load(source, variant=None, attention="xla")
    dynamics = sampling.read_dynamics(pipe.scheduler, pipe.index, "auto")
    digests = {part: files.sha256_of_params(params) for part, params in pipe.params.items()}
    return Model(name, pipe, dynamics, float(alpha), tuple(steps), files.sha256_of_json(digests))


def _alpha_of_pairs(workdir: Path) -> float:
    directory = workdir / generate.DIRECTORY
    if not (directory / pairs_manifest.MANIFEST).is_file():
        raise FileNotFoundError(
            f"{directory} holds no pairs that would tell the teacher's guidance: set "
            "--config.teacher.alpha, or make them with configs/generate.py"
        )
    return float(pairs_manifest.read(directory)["recipe"]["alpha"])


def _check_same_networks(teacher: Model, model: Model, source: Path) -> None:
    """All are run by the same compiled programs."""
    for part, net in teacher.pipe.nets.items():
        if net.shapes != model.pipe.nets[part].shapes or net.config != model.pipe.nets[part].config:
            raise ValueError(
                f"{source}/{part} is not the network of the teacher it is judged beside; judge it in a "
                "workdir of its own, with --config.teacher.model naming its teacher"
            )


def check_seeds(config: ConfigDict, workdir: Path) -> None:
    """ValueError if the noise of the evaluation was trained on."""
    for folder in (workdir, *(workdir / name for name in folders(config))):
        manifest = folder / generate.DIRECTORY / pairs_manifest.MANIFEST
        used = pairs_manifest.read(manifest.parent)["recipe"]["seed"] if manifest.is_file() else None
        if used in range(config.seed, config.seed + 3):
            raise ValueError(
                f"config.seed={config.seed} and the two after it must not be {used}, from which the pairs in "
                f"{manifest.parent} were made: take another"
            )
