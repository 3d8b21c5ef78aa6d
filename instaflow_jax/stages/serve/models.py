"""What the page of `serve` calls: models on the device, and requests checked and answered; usable without gradio."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jaxtyping import UInt8

from instaflow_jax import pipeline, sampling
from instaflow_jax.infra import images
from instaflow_jax.stages.common import control
from instaflow_jax.stages.common.control import Condition, Control, ImageFile
from instaflow_jax.stages.common.loading import check_drawn, compile_and_log, name_image

SEEDS = 2**32  # seeds are below this
ImageBytes = UInt8[np.ndarray, "H W 3"]


@dataclasses.dataclass(frozen=True)
class Model:
    """A compiled model on the device.

    Attributes:
      title: shown above its images, before the number of steps; '' for the model that the page is about.
      choices: the numbers of solver steps N that it is compiled for.
      max_tokens: tokens that a prompt may have.
      count_tokens: prompt → its number of tokens.
      draw: (prompt, seed, N, *condition images) → uint8 image [H, W, 3]; raises ValueError if the image is NaN or
        infinite.
    """

    title: str
    choices: tuple[int, ...]
    max_tokens: int
    count_tokens: Callable[[str], int]
    draw: Callable[..., ImageBytes]


@dataclasses.dataclass(frozen=True)
class Result:
    """One model's answer: for each seed an image and the seconds it took."""

    title: str
    N: int
    seeds: tuple[int, ...]
    images: list[ImageBytes]
    seconds: list[float]

    @property
    def heading(self) -> str:
        """What is shown above the images, without the seconds."""
        return heading(self.title, self.N)


Respond = Callable[..., Iterator[Result]]


def heading(title: str, N: int) -> str:
    """ "one step" or "teacher, 25 steps"."""
    steps = "one step" if N == 1 else f"{N} steps"
    return f"{title}, {steps}" if title else steps


def make_model(
    pipe: pipeline.Pipeline,
    title: str,
    *,
    dynamics: str,
    alpha: float,
    choices: tuple[int, ...],
    controls: Sequence[Control] = (),
) -> Model:
    """Puts a pipeline on the device, compiles it for each number of solver steps, and runs each program once.

    The batch size is 1, so the seconds shown are those of one image, as in the paper's table.
    """
    read = sampling.read_dynamics(pipe.scheduler, pipe.index, dynamics)
    size = pipe.image_size(pipe.latent_shape)
    blank = [np.zeros((1, *size, 3), np.float32)] * len(controls)
    params, null = jax.device_put(control.inference_params(pipe, controls, blank)), pipe.tokenizer([""])
    noise = jax.jit(functools.partial(sampling.noise, shape=pipe.latent_shape))

    def inputs(prompt: str, seed: int, conditions: Sequence[Condition]) -> tuple:
        steered = control.with_conditions(params, conditions)
        return steered, pipe.tokenizer([prompt]), null, noise(np.array([seed], np.uint32))

    programs = {}
    for N in choices:
        print(f"{heading(title, N)}: ", end="", flush=True)
        solve = sampling.make_solve(control.make_apply(pipe, controls), read, "auto", N, alpha)
        programs[N] = compile_and_log(sampling.make_generate(pipe.nets, solve), inputs("", 0, blank))
        jax.block_until_ready(programs[N](*inputs("", 0, blank)))

    def draw(prompt: str, seed: int, N: int, *files: ImageFile) -> ImageBytes:
        conditions = [control.to_condition(image, *size) for image in files]
        drawn, finite = programs[N](*inputs(prompt, seed, conditions))
        check_drawn(np.asarray(finite), [name_image(prompt, seed)])
        return np.asarray(drawn)[0]

    max_tokens = pipe.tokenizer.model_max_length - 2  # without the tokens that mark the start and the end
    return Model(title, choices, max_tokens, pipe.tokenizer.count, draw)


# ---------------------------------------------------------------- requests


def make_respond(models: Sequence[Model], *, max_chars: int, max_images: int, controls: Sequence[str] = ()) -> Respond:
    """`respond(prompt, seed, N, count, *files)` yields each model's result as soon as it is ready.

    N is the number of solver steps of the first model; the others have one choice each. The seeds of the images are
    seed, seed + 1, ..., and all models start from the same noise. `files` are the condition images of the ControlNets
    called `controls`. A request that is out of bounds raises ValueError before anything is drawn.
    """

    def respond(prompt: str | None, seed: float | None, N: float, count: float, *files: str | None) -> Iterator[Result]:
        prompt = check_prompt(prompt, models, max_chars)
        count = parse_int("the number of images", count, 1, max_images)
        seed = parse_int("the seed", seed, 0, SEEDS - count)
        if N not in models[0].choices:
            raise ValueError(
                f"N={N} is not available; use one of {', '.join(map(str, models[0].choices))} solver steps"
            )
        conditions = read_files(files, controls)
        for model in models:
            steps = int(N) if model is models[0] else model.choices[0]
            yield draw(model, prompt, range(seed, seed + count), steps, conditions)

    return respond


def draw(model: Model, prompt: str, seeds: Sequence[int], N: int, conditions: Sequence[ImageFile]) -> Result:
    """One image for each seed, one after the other, with the seconds each takes."""
    result = Result(model.title, N, tuple(seeds), [], [])
    for seed in seeds:
        start = time.perf_counter()
        result.images.append(model.draw(prompt, seed, N, *conditions))
        result.seconds.append(time.perf_counter() - start)
    return result


def check_prompt(prompt: str | None, models: Sequence[Model], max_chars: int) -> str:
    """The prompt without surrounding spaces.

    Raises:
      ValueError: it is empty, or too long for a text encoder; names the number of tokens that fit.
    """
    prompt = (prompt or "").strip()
    if not prompt:
        raise ValueError("the prompt is empty; write what to draw")
    if len(prompt) > max_chars:
        raise ValueError(f"the prompt has {len(prompt)} characters; use at most {max_chars}")
    for model in models:
        tokens = model.count_tokens(prompt)
        if tokens > model.max_tokens:
            raise ValueError(f"the prompt has {tokens} tokens; use at most {model.max_tokens}")
    return prompt


def read_files(files: Sequence[str | None], controls: Sequence[str]) -> list[ImageFile]:
    """The uploaded condition images, one for each of the ControlNets called `controls`.

    Raises:
      ValueError: one is missing, or is not an image.
    """
    missing = [name for name, file in zip(controls, files, strict=True) if not file]
    if missing:
        raise ValueError(f"the image for {missing[0]} is missing; choose a file")
    return [images.load_rgb(file) for file in files]


def parse_int(what: str, value: float | None, least: int, most: int) -> int:
    """A number from a form as an integer.

    Raises:
      ValueError: it is not an integer from `least` to `most`.
    """
    if not isinstance(value, int | float) or not least <= value <= most or value != int(value):
        raise ValueError(f"{what} must be an integer from {least} to {most}, not {value}")
    return int(value)
