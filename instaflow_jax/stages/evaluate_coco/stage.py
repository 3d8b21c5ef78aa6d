"""Stage `evaluate_coco`: images for COCO's captions by one or several models, measured against COCO's photographs.

Everything is checked before the first image is made. Images are written atomically, so a killed run continues where it
stopped. Processes share the images between them, in one directory. All of them measure, so that none waits for another,
and the first one writes the results. One model at a time is in memory.
"""

from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from instaflow_jax import __version__
from instaflow_jax.data import coco
from instaflow_jax.infra import devices
from instaflow_jax.infra.files import write_json, write_text
from instaflow_jax.stages.common.machine import machine
from instaflow_jax.stages.evaluate_coco import measures, rows, table
from instaflow_jax.stages.evaluate_coco.job import Job, draw, measure_model, prepare, with_model, without_model


def run(config: ConfigDict, workdir: str) -> None:
    """Writes `workdir`/evaluate/coco: pictures/, reference.npz, results.json and results.md.

    A row of `config.extra` has a folder there for its own pictures/ and results.json.

    Raises:
      ValueError, FileNotFoundError: a field of the config, or a file of a model or COCO, is wrong; nothing is written.
    """
    jobs, judges, photos = check(config, workdir)
    directory, data, size = jobs[0].directory, config.data, config.size
    real = measures.reference(judges, photos, directory, source=data.source, split=data.split, size=size)
    options = {f"straightness_{name}": value for name, value in config.straightness.items()}
    options["repeats"] = config.repeats
    lines = []
    while jobs:
        lines.append(measure_row(jobs.pop(0), judges, real, options, config.to_dict()))
    if jax.process_index() == 0:
        title = f"COCO, {data.source}, {size}×{size} pixels"
        text = table.page(title, lines, config.paper, machine()["device"])
        write_text(directory / "results.md", text)
        print(f"{text}\nwrote {directory / 'results.md'}", flush=True)


def check(config: ConfigDict, workdir: str) -> tuple[list[Job], measures.Judges, list[coco.Photo]]:
    """Every check of `run`, without drawing; returns the rows, the networks that measure, and all photographs.

    Raises:
      ValueError, FileNotFoundError: see `run`.
    """
    first, *extra = rows.read(config)
    data, directory = config.data, Path(workdir) / "evaluate" / "coco"
    photos = coco.load(data.source, data.captions, data.split)
    chosen = coco.choose(photos, data.count)
    if not config.reference:
        coco.check_present(photos)
    judges = measures.load(**{name: config[name] for name in ("inception", "clip", "reference", "batch")})
    waiting = [prepare_extra(row, chosen, directory / rows.folder(row)) for row in extra]
    return [prepare(first, chosen, directory), *waiting], judges, photos


def prepare_extra(row: rows.Options, photos: list[coco.Photo], directory: Path) -> Job:
    """A row of `config.extra`, checked, without its model. Raises as `prepare` does, naming the row."""
    try:
        return without_model(prepare(row, photos, directory))
    except ValueError as error:
        raise ValueError(f"config.extra, {directory.name}: {error}") from error


def measure_row(
    job: Job, judges: measures.Judges, real: measures.Reference, options: dict[str, int], config: dict[str, Any]
) -> dict[str, Any]:
    """Draws and measures one row, and writes its results.json; returns its line of the table.

    Args:
      real: from `measures.reference`.
      options: the keywords of `measure_model`.
      config: is recorded.
    """
    job = with_model(job)
    draw(job)
    devices.barrier(f"images of COCO's captions, {job.directory.name}")
    of_model = measure_model(job, **options)
    job = without_model(job)
    captions = {job.path(photo): photo.caption for photo in job.photos}
    results = measures.measure(judges, real, captions, job.options.size) | of_model
    if jax.process_index() == 0:
        report(job, results, config)
    solving = job.options.solving
    return {"model": job.options.model, "N": solving.N, "alpha": solving.alpha} | results


def report(job: Job, results: dict[str, Any], config: dict[str, Any]) -> None:
    """Writes a row's results.json."""
    about = {
        "model": job.options.model,
        "code": f"instaflow_jax {__version__}",
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "config": config,
    }
    path = job.directory / "results.json"
    write_json(path, {"results": results, "recipe": job.recipe, "about": about})
    print(f"wrote {path}", flush=True)
