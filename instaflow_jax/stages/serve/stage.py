"""Stage `serve`: a web page that draws a prompt in one step, beside the teacher at 25, with the time each takes.

Everything but the page itself (`serve_page`) is plain functions, usable without gradio.
"""

import dataclasses
import functools
import importlib.util
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict

from instaflow_jax import pipeline, sampling
from instaflow_jax.stages.common import loading

SEEDS = 2**32  # what seeds must be below
Draw = Callable[[str, int, int], UInt8[np.ndarray, "H W 3"]]


@dataclasses.dataclass(frozen=True)
class Painter:
    """A model on the device.

    Attributes:
      title: what stands above its pictures.
      counts: numbers of steps that it is compiled for.
      room: tokens that a prompt may have.
      count_tokens: prompt → its number of tokens.
      draw: (prompt, seed, N) → uint8 picture [H, W, 3].
    """

    title: str
    counts: tuple[int, ...]
    room: int
    count_tokens: Callable[[str], int]
    draw: Draw


@dataclasses.dataclass(frozen=True)
class Drawn:
    """One painter's answer: uint8 pictures [H, W, 3], one a seed, and the seconds that each took."""

    title: str
    N: int
    seeds: tuple[int, ...]
    pictures: list[UInt8[np.ndarray, "H W 3"]]
    seconds: list[float]


Respond = Callable[[str, float, float, float], Iterator[Drawn]]


def run(config: ConfigDict, workdir: str) -> None:
    """Serves the page until Ctrl-C.

    Raises:
      ValueError, FileNotFoundError: a field of the config, or a file of a model, is wrong.
      OSError: the port is taken.
    """
    start(config, workdir).block_thread()


def start(config: ConfigDict, workdir: str):
    """Loads and compiles the models, and gives the gradio page, which serves from a thread of its own until `close()`."""
    check(config)
    painters, notice = load_painters(config, workdir)
    respond = make_respond(painters, max_chars=config.max_chars, max_pictures=config.max_pictures)
    from instaflow_jax.stages.serve import page as serve_page

    page = serve_page.make_page(
        painters,
        respond,
        notice=notice,
        examples=config.examples,
        max_chars=config.max_chars,
        max_pictures=config.max_pictures,
    )
    url = serve_page.open_page(page, host=config.host, port=config.port, queue=config.queue)
    print(f"the page is at {url} (Ctrl-C ends it)", flush=True)
    return page


def check(config: ConfigDict) -> None:
    """Everything that can be refused before a model is loaded.

    Raises:
      ValueError: a field is wrong, or gradio is not installed.
      OSError: nothing can listen at that host and port.
    """
    loading.read_weight_options(config)
    for name in ("max_chars", "max_pictures", "queue", "teacher_N"):
        if config[name] < 1:
            raise ValueError(f"config.{name}={config[name]} must be at least 1")
    if not config.N or min(config.N) < 1:
        raise ValueError(f"config.N={config.N} must name at least one number of steps, each at least 1")
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("the web page needs gradio, which is not installed: pip install -e .[serve]")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.host, config.port))
        except OSError as error:
            raise OSError(
                f"cannot listen at config.host={config.host!r}, config.port={config.port}: {error.strerror}; "
                "another server may be there, try another --config.port"
            ) from error


# ---------------------------------------------------------------- models


def load_painters(config: ConfigDict, workdir: str) -> tuple[list[Painter], str]:
    """The one-step model and the teacher, whichever there are, in the order they are shown; and what to tell of them.

    Raises:
      FileNotFoundError: there is neither.
    """
    source, notice = find_model(config, workdir)
    painters = []
    if source:
        pipe = loading.load(source, loading.read_weight_options(config))
        painters.append(
            make_painter(pipe, source, dynamics=config.dynamics, alpha=config.alpha, counts=tuple(config.N))
        )
    if config.teacher:
        pipe = pipeline.load(
            config.teacher,
            variant=config.weights_variant or None,
            dtype=loading.DTYPES[config.dtype],
            attention=config.attention,
            base=config.base,
        )
        painters.append(
            make_painter(
                pipe,
                config.teacher,
                dynamics=config.teacher_dynamics,
                alpha=config.teacher_alpha,
                counts=(config.teacher_N,),
            )
        )
    return painters, notice


def find_model(config: ConfigDict, workdir: str) -> tuple[str, str]:
    """The one-step model to load, '' for none, and a line about it if it is not as asked."""
    made = Path(workdir) / "distill" / "export"
    if config.model or (made / "model_index.json").is_file():
        return config.model or str(made), ""
    lack = f"There is no one-step model in {made} yet; --config=configs/distill.py makes one"
    if not config.teacher:
        raise FileNotFoundError(f"{lack}. Name another by --config.model, or a teacher by --config.teacher")
    notice = f"{lack}. Until then the teacher is shown alone."
    print(notice, flush=True)
    return "", notice


def make_painter(
    pipe: pipeline.Pipeline, title: str, *, dynamics: str, alpha: float, counts: tuple[int, ...]
) -> Painter:
    """Puts a pipeline on the device, compiles it for each number of steps, and runs each once.

    The batch is 1 everywhere: then the seconds shown are those of one picture, as the paper's table counts them.
    """
    shape = pipe.latent_shape
    model_dynamics = sampling.read_dynamics(pipe.scheduler, pipe.index, dynamics)
    params, null = jax.device_put(pipe.params), pipe.tokenizer([""])
    noise = jax.jit(functools.partial(sampling.noise, shape=shape))

    def inputs(prompt: str, seed: int) -> tuple:
        return params, pipe.tokenizer([prompt]), null, noise(np.array([seed], np.uint32))

    programs = {}
    for N in counts:
        print(f"{title}, N={N}: ", end="", flush=True)
        solve = sampling.make_solve(pipe.nets["unet"].apply, model_dynamics, "auto", N, alpha)
        programs[N] = loading.compile_and_log(sampling.make_generate(pipe.nets, solve), inputs("", 0))
        programs[N](*inputs("", 0))[0].block_until_ready()

    def draw(prompt: str, seed: int, N: int) -> UInt8[np.ndarray, "H W 3"]:
        return np.asarray(programs[N](*inputs(prompt, seed)))[0]

    room = pipe.tokenizer.model_max_length - 2  # without the marks of its begin and end
    return Painter(title, counts, room, pipe.tokenizer.count, draw)


# ---------------------------------------------------------------- requests


def make_respond(painters: Sequence[Painter], *, max_chars: int, max_pictures: int) -> Respond:
    """`respond(prompt, seed, N, pictures)` gives each painter's answer as soon as it is drawn.

    N counts the first painter's steps; the others keep their own. Pictures have the seeds seed, seed + 1, ..., and all
    painters begin from the same noise. ValueError, before anything is drawn, for a request that is out of bounds.
    """

    def respond(prompt: str, seed: float, N: float, pictures: float) -> Iterator[Drawn]:
        prompt = check_prompt(prompt, painters, max_chars)
        count = whole("the number of pictures", pictures, 1, max_pictures)
        seed = whole("the seed", seed, 0, SEEDS - count)
        if N not in painters[0].counts:
            raise ValueError(f"{N} steps are not among the possible {', '.join(map(str, painters[0].counts))}")
        for painter in painters:
            steps = int(N) if painter is painters[0] else painter.counts[0]
            yield paint(painter, prompt, tuple(range(seed, seed + count)), steps)

    return respond


def paint(painter: Painter, prompt: str, seeds: tuple[int, ...], N: int) -> Drawn:
    """A picture for each seed, one after the other."""
    pictures, seconds = [], []
    for seed in seeds:
        began = time.perf_counter()
        pictures.append(painter.draw(prompt, seed, N))
        seconds.append(time.perf_counter() - began)
    return Drawn(painter.title, N, seeds, pictures, seconds)


def check_prompt(prompt: str, painters: Sequence[Painter], max_chars: int) -> str:
    """The prompt without blanks around it.

    Raises:
      ValueError: it is empty, or longer than the text encoder takes, with the number of tokens that fit.
    """
    prompt = (prompt or "").strip()
    if not prompt:
        raise ValueError("write a prompt: what shall be drawn?")
    if len(prompt) > max_chars:
        raise ValueError(f"the prompt has {len(prompt)} characters; at most {max_chars} are taken")
    for painter in painters:
        tokens = painter.count_tokens(prompt)
        if tokens > painter.room:
            raise ValueError(f"the prompt has {tokens} tokens, but {painter.room} fit: shorten it")
    return prompt


def whole(what: str, value: float, least: int, most: int) -> int:
    """A number from a form as a whole one.

    Raises:
      ValueError: it is none, or not within the bounds.
    """
    if not isinstance(value, int | float) or not least <= value <= most or value != int(value):
        raise ValueError(f"{what} must be a whole number from {least} to {most}, not {value}")
    return int(value)
