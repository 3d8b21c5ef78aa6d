"""Stage `serve`: a web page that draws a prompt in one step beside the teacher, with the seconds each takes."""

import dataclasses
import socket
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from instaflow_jax import pipeline, sampling
from instaflow_jax.stages.common.control import check_fit, load_controls
from instaflow_jax.stages.common.loading import WeightOptions, load, read_weight_options
from instaflow_jax.stages.common.ranges import check_ranges
from instaflow_jax.stages.serve.models import make_model
from instaflow_jax.stages.serve.requests import make_respond


def run(config: ConfigDict, workdir: str) -> None:
    """Serves the page until Ctrl-C.

    Raises:
      ValueError, FileNotFoundError: a field of the config, or a file of a model, is wrong.
      OSError: the port is taken.
      ModuleNotFoundError: gradio is not installed.
    """
    start(config, workdir).block_thread()


def start(config: ConfigDict, workdir: str) -> Any:
    """Loads and compiles the models; returns the gradio page, which its own thread serves until `close()`.

    Raises as `run` does, before anything is compiled.
    """
    from instaflow_jax.stages.serve.page import layout, server  # gradio is imported only here

    loaded, notice = load_models(config, workdir)
    print(
        "compiling, usually in some seconds for the embedded models and one to two minutes for Stable Diffusion on a "
        "GPU; the page opens after that",
        flush=True,
    )
    models = [make_model(pipe, **options) for pipe, options in loaded]
    names = [Path(control.source).name for control in loaded[0][1]["controls"]]
    limits = {"max_chars": config.max_chars, "max_images": config.max_images, "controls": names}
    blocks = layout.make_page(models, make_respond(models, **limits), notice=notice, examples=config.examples, **limits)
    url = server.open_page(blocks, host=config.host, port=config.port, queue=config.queue, uploads=bool(names))
    print(f"the page is at {url} (Ctrl-C ends it)", flush=True)
    return blocks


def check(config: ConfigDict, workdir: str) -> None:
    """Every check of `run`, without compiling. Raises as `run` does."""
    from instaflow_jax.stages.serve.page import layout  # noqa: F401 (is gradio installed?)

    load_models(config, workdir)


def load_models(config: ConfigDict, workdir: str) -> tuple[list[tuple[pipeline.Pipeline, dict[str, Any]]], str]:
    """The models with their options of `make_model`, the one-step model first, and the notice for the page.

    Settings are checked before anything is loaded. Raises as `run` does.
    """
    check_ranges(config)
    weights = read_weight_options(config)
    check_address(config.host, config.port)
    source, notice = find_model(config.model, config.teacher, Path(workdir))
    loaded = []
    if source:
        options = {"dynamics": config.dynamics, "alpha": config.alpha, "choices": tuple(config.N)}
        print(f"one step: {source}", flush=True)
        loaded.append((load(source, weights), {"title": "", "source": source, **options}))
    if config.teacher:
        options = {"dynamics": config.teacher_dynamics, "alpha": config.teacher_alpha, "choices": (config.teacher_N,)}
        print(f"teacher: {config.teacher}", flush=True)
        loaded.append(
            (load(config.teacher, as_published(weights)), {"title": "teacher", "source": config.teacher, **options})
        )
    controls = load_controls(config.controls, loaded[0][0], weights)
    for pipe, options in loaded:
        options["controls"] = controls
        for control in controls:
            check_fit(control, pipe)
        dynamics = sampling.read_dynamics(pipe.scheduler, pipe.index, options["dynamics"])
        for N in options["choices"]:
            sampling.solver_table(dynamics, "auto", N)
    return loaded, notice


def as_published(weights: WeightOptions) -> WeightOptions:
    """The options for the teacher, whose weights stay unchanged."""
    return dataclasses.replace(weights, delta=None, loras=())


def check_address(host: str, port: int) -> None:
    """Raises OSError if nothing can listen at this host and port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise OSError(
                f"cannot listen at config.host={host!r}, config.port={port}: {error.strerror}; "
                "if another server runs there, use another --config.port"
            ) from error


def find_model(model: str, teacher: str, workdir: Path) -> tuple[str, str]:
    """The one-step model to load ('' for none) and, if it is missing, a notice for the page.

    Args:
      model: `config.model`; '' looks for what the stage distill left in `workdir`.
      teacher: `config.teacher`, which can be shown alone.

    Raises:
      FileNotFoundError: there is neither a one-step model nor a teacher.
    """
    distilled = workdir / "distill" / "export"
    if model or (distilled / "model_index.json").is_file():
        return model or str(distilled), ""
    missing = f"There is no one-step model in {distilled} yet; --config=configs/distill.py makes one"
    if not teacher:
        raise FileNotFoundError(f"{missing}. Use --config.model to name another, or --config.teacher to name a teacher")
    notice = f"{missing}. Until then the page shows the teacher alone."
    print(notice, flush=True)
    return "", notice
