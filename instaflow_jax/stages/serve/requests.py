"""Requests of the page: checked, and answered by the models one after the other; usable without gradio."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import instaflow_jax
from instaflow_jax.infra import images
from instaflow_jax.stages.common.control import ImageFile
from instaflow_jax.stages.serve.models import ImageBytes, Model, Settings, heading

SEEDS = 2**32  # seeds are below this
MAX_ALPHA = 30.0  # guidance that a visitor may choose
Number = int | float | None  # what a number field of the page holds
Report = Callable[[str, int, int], None]  # is told the heading, and how many of how many steps are done


@dataclasses.dataclass(frozen=True)
class Result:
    """One model's answer: images, what each was drawn from, and the seconds it took."""

    model: Model
    settings: list[Settings]
    images: list[ImageBytes]
    seconds: list[float]

    @property
    def heading(self) -> str:
        """What is shown above the images, without the seconds."""
        return heading(self.model.title, self.settings[0].N)

    @property
    def metadata(self) -> list[dict[str, str]]:
        """What is stored in each image's file: as the stage `sample` does, and the walk between two seeds."""
        return [describe(self.model, settings) for settings in self.settings]


Respond = Callable[..., Iterator[Result]]


def describe(model: Model, settings: Settings) -> dict[str, str]:
    """The text in the metadata of an image."""
    fields = {
        "prompt": settings.prompt,
        "negative": settings.negative,
        "seed": str(settings.seed),
        "N": str(settings.N),
        "alpha": f"{settings.alpha:g}",
        "model": model.source,
        "version": f"instaflow_jax {instaflow_jax.__version__}",
    }
    if settings.position:
        fields |= {"second_seed": str(settings.second_seed), "position": f"{settings.position:g}"}
    return fields


def make_respond(models: Sequence[Model], *, max_chars: int, max_images: int, controls: Sequence[str] = ()) -> Respond:
    """`respond(prompt, seed, N, count, *files, ...)` yields each model's result as soon as it is ready.

    N is the number of solver steps of the first model; the others have one choice each. The seeds of the images are
    seed, seed + 1, ..., and all models start from the same noise. `files` are the condition images of the ControlNets
    called `controls`. `position` moves the noise of each image towards that of second_seed, second_seed + 1, ...
    `negative` and `alphas` (one for each) are for the models that are guided. A request that is out of bounds raises
    ValueError before anything is drawn.
    """

    def respond(
        prompt: str | None,
        seed: Number,
        N: Number,
        count: Number,
        *files: str | None,
        second_seed: Number = None,
        position: Number = 0,
        negative: str | None = "",
        alphas: Sequence[Number] | None = None,
        report: Report = lambda heading, done, steps: None,
    ) -> Iterator[Result]:
        prompt = check_prompt("the prompt", prompt, models, max_chars)
        if not prompt:
            raise ValueError("the prompt is empty; write what to draw")
        count = parse_int("the number of images", count, 1, max_images)
        walks = parse_walks(seed, second_seed, position, count)
        if N not in models[0].choices:
            raise ValueError(
                f"N={N} is not available; use one of {', '.join(map(str, models[0].choices))} solver steps"
            )
        guidance = parse_guidance(negative, alphas, models, max_chars)
        conditions = read_files(files, controls)
        for model, guides in zip(models, guidance, strict=True):
            steps = int(N) if model is models[0] else model.choices[0]
            settings = [Settings(prompt, N=steps, **walk, **guides) for walk in walks]
            yield draw(model, settings, conditions, report)

    return respond


def parse_walks(seed: Number, second_seed: Number, position: Number, count: int) -> list[dict[str, Any]]:
    """Seeds and position of `count` images, as fields of `Settings`.

    Raises:
      ValueError: a seed or the position is out of bounds; the second seed counts only where there is a walk.
    """
    seed = parse_int("the seed", seed, 0, SEEDS - count)
    position = parse_number("the position between the seeds", position, 0, 1)
    second_seed = parse_int("the second seed", second_seed, 0, SEEDS - count) if position else seed
    return [{"seed": seed + i, "second_seed": second_seed + i, "position": position} for i in range(count)]


def parse_guidance(
    negative: str | None, alphas: Sequence[Number] | None, models: Sequence[Model], max_chars: int
) -> list[dict[str, Any]]:
    """Negative prompt and guidance of each model, as fields of `Settings`; none for a model that is not guided.

    Args:
      alphas: the guidance of each model that is guided; None for the models' own.

    Raises:
      ValueError: one is out of bounds, or the negative prompt would have no effect.
    """
    guided = [model for model in models if model.guided]
    negative = check_prompt("the negative prompt", negative, guided, max_chars)
    alphas = [model.alpha for model in guided] if alphas is None else alphas
    most = max(MAX_ALPHA, *(model.alpha for model in models))
    alphas = [parse_number("the guidance", alpha, 1, most) for alpha in alphas]
    if negative and all(alpha == 1 for alpha in alphas):
        raise ValueError("the negative prompt has no effect without guidance; use a guidance above 1")
    rest = iter(alphas)
    return [{"negative": negative, "alpha": next(rest)} if model.guided else {} for model in models]


def draw(model: Model, settings: Sequence[Settings], conditions: Sequence[ImageFile], report: Report) -> Result:
    """One image for each of the settings, one after the other, with the seconds each takes."""
    result = Result(model, list(settings), [], [])
    steps = sum(one.N for one in settings)
    before = 0
    for one in settings:
        start = time.perf_counter()
        result.images.append(model.draw(one, conditions, make_tell(report, result.heading, before, steps)))
        result.seconds.append(time.perf_counter() - start)
        before += one.N
    return result


def make_tell(report: Report, heading: str, before: int, steps: int) -> Callable[[int], None]:
    """Turns the steps that are done of one image into those of a request of `steps`."""
    return lambda done: report(heading, before + done, steps)


def check_prompt(what: str, prompt: str | None, models: Sequence[Model], max_chars: int) -> str:
    """The prompt without surrounding spaces.

    Raises:
      ValueError: it is too long for a text encoder; names the number of tokens that fit.
    """
    prompt = (prompt or "").strip()
    if len(prompt) > max_chars:
        raise ValueError(f"{what} has {len(prompt)} characters; use at most {max_chars}")
    for model in models:
        tokens = model.count_tokens(prompt)
        if tokens > model.max_tokens:
            raise ValueError(f"{what} has {tokens} tokens; use at most {model.max_tokens}")
    return prompt


def read_files(files: Sequence[str | None], controls: Sequence[str]) -> list[ImageFile]:
    """The uploaded condition images, one for each of the ControlNets called `controls`.

    Raises:
      ValueError: one is missing, or is not an image.
    """
    missing = [name for name, file in zip(controls, files, strict=True) if not file]
    if missing:
        raise ValueError(f"the image for {missing[0]} is missing; choose a file")
    return [read_file(name, file) for name, file in zip(controls, files, strict=True)]


def read_file(name: str, file: str) -> ImageFile:
    """An uploaded image. Raises ValueError if it is not one, without the folder that it was uploaded to."""
    try:
        return images.load_rgb(file)
    except ValueError:
        raise ValueError(f"{Path(file).name}, the image for {name}, is not readable; choose another file") from None


def parse_int(what: str, value: Number, least: int, most: int) -> int:
    """A number from a form as an integer.

    Raises:
      ValueError: it is not an integer from `least` to `most`.
    """
    if not isinstance(value, int | float) or not least <= value <= most or value != int(value):
        raise ValueError(f"{what} must be an integer from {least} to {most}, not {value}")
    return int(value)


def parse_number(what: str, value: Number, least: float, most: float) -> float:
    """A number from a form.

    Raises:
      ValueError: it is not a number from `least` to `most`.
    """
    if not isinstance(value, int | float) or not least <= value <= most:
        raise ValueError(f"{what} must be a number from {least:g} to {most:g}, not {value}")
    return float(value)
