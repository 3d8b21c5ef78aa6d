"""What happens when a visitor uses the page of `serve`."""

import contextlib
import inspect
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gradio

from instaflow_jax.stages.serve.requests import Respond
from instaflow_jax.stages.serve.session import Column, Drawing, download, remember, save

Fields = dict[str, gradio.components.Component]  # by the name of the argument that the API and `respond` have for it
PRIVATE = {"api_visibility": "private"}
QUIET = {"show_progress": "hidden", **PRIVATE}


class ModelColumn(NamedTuple):
    """Where a model's answer is shown."""

    title: gradio.Markdown
    images: gradio.Gallery
    download: gradio.DownloadButton


class Parts(NamedTuple):
    """The parts of the page that react.

    Attributes:
      draw, reseed: the button that draws, and the one that takes another seed first.
      waiting: shows the place in the queue, the steps done and the seconds.
      session: the thumbnails.
    """

    fields: Fields
    draw: gradio.Button
    reseed: gradio.Button
    waiting: gradio.Markdown
    columns: list[ModelColumn]
    session: gradio.Gallery


def listen(parts: Parts, respond: Respond) -> None:
    """Connects the parts of a page with `respond`; only the button that draws has a name in the API."""
    drawn, kept = gradio.State(), gradio.State([])
    fields, inputs, walk = list(parts.fields), list(parts.fields.values()), parts.fields["position"]
    outputs = [*(part for column in parts.columns for part in (column.title, column.images)), drawn]
    downloads = [column.download for column in parts.columns]
    ask, folder = make_ask(respond, fields), Path(gradio.utils.get_upload_folder())
    answer = make_answer(ask, len(parts.columns), folder)
    live = make_live(ask, len(parts.columns), folder)
    settle = make_settle(answer, len(parts.columns), fields.index("position"))
    device = {"concurrency_limit": 1, "concurrency_id": "device"}
    job = {"inputs": inputs, "outputs": outputs, "show_progress_on": parts.waiting, **device}
    drawing = {"fn": with_names(answer, fields), **job}
    settling = {"fn": with_names(settle, [*fields, "drawn"]), **job, "inputs": [*inputs, drawn]}

    enter = [parts.fields[name].submit for name in ("prompt", "negative", "seed", "second_seed") if name in fields]
    reseeded = parts.reseed.click(draw_seed, None, parts.fields["seed"], queue=False, **QUIET)
    for event in (
        gradio.on([parts.draw.click, *enter], api_name="draw", **drawing),
        reseeded.then(**drawing, **PRIVATE),
        walk.release(trigger_mode="always_last", **settling, **PRIVATE),
    ):
        event.success(keep, [drawn, kept], [kept, parts.session, *downloads], queue=False, **QUIET)
    walk.input(live, [*inputs, drawn, kept], [*outputs, downloads[0]], trigger_mode="always_last", **QUIET, **device)
    parts.session.select(bring_back, kept, [*inputs, *outputs, *downloads], queue=False, **QUIET)


def draw_seed() -> int:
    """A seed that a visitor has probably not seen."""
    return random.randrange(2**31)


def make_ask(respond: Respond, names: Sequence[str]) -> Callable:
    """`respond` with the values of the fields called `names`, and a report of the steps done."""

    def ask(values, report):
        given = dict(zip(names, values, strict=True))
        files = [given.pop(name) for name in names if name.startswith("image_")]
        alphas = [given.pop(name) for name in names if name.endswith("alpha")]
        first = [given.pop(name) for name in ("prompt", "seed", "N", "count")]
        return respond(*first, *files, alphas=alphas, report=report, **given)

    return ask


def make_answer(ask: Callable, columns: int, folder: Path) -> Callable[..., Iterator[list]]:
    """Draws: fills one column after the other, and reports the steps done; an invalid request is shown as text."""

    def answer(*arguments):
        *values, progress = arguments
        saved = ()
        with as_text():
            for result in ask(values, lambda heading, done, steps: progress((done, steps), heading, unit="steps")):
                saved = (*saved, save(result, folder))
                yield [*show(saved, columns), Drawing(tuple(values), saved)]

    # gradio looks for a generator function, which the run-time type checker's wrapper around `answer` is not.
    return lambda *arguments: (yield from answer(*arguments))


def make_live(ask: Callable, columns: int, folder: Path) -> Callable[..., list]:
    """Draws with the first model alone, while the slider moves; each image replaces the one before it on the disk."""

    def live(*arguments):
        *values, drawn, kept = arguments
        if drawn and drawn.fields == tuple(values) and len(drawn.columns) == columns:
            return gradio.skip()
        with as_text():
            column = save(next(ask(values, lambda *_: None)), folder)
        if drawn and drawn.passing and drawn not in kept:
            drawn.remove()
        return [*show((column,), columns), Drawing(tuple(values), (column,), passing=True), offer(column)]

    return live


def make_settle(answer: Callable, columns: int, position: int) -> Callable[..., Iterator[Any]]:
    """Draws with all models when the slider is let go of, which gradio also reports when it has not moved.

    Args:
      position: index of the slider among the fields.
    """

    def settle(*arguments):
        *values, drawn, progress = arguments
        before = drawn.fields[position] if drawn else 0
        if values[position] != before or (drawn and len(drawn.columns) < columns):
            yield from answer(*values, progress)
        else:
            yield gradio.skip()

    return lambda *arguments: (yield from settle(*arguments))


def keep(drawn: Drawing | None, kept: list[Drawing]) -> Any:
    """The session with what has been drawn, its thumbnails, and the downloads."""
    if drawn is None:
        return gradio.skip()
    kept = remember(drawn, kept)
    thumbnails = [(str(old.columns[0].files[0][0]), old.fields[0]) for old in kept]
    style = {"visible": True, "selected_index": None, "elem_classes": [*classes(drawn.columns[0]), "session"]}
    return [kept, gradio.Gallery(thumbnails, **style), *map(offer, drawn.columns)]


def bring_back(kept: list[Drawing], event: gradio.SelectData) -> list[Any]:
    """The fields and images of the drawing whose thumbnail was clicked."""
    drawing = kept[event.index]
    columns = drawing.columns
    return [*drawing.fields, *show(columns, len(columns)), drawing, *map(offer, columns)]


def show(saved: Sequence[Column], columns: int) -> list[Any]:
    """Headings and galleries: of the models that have drawn, and dimmed what the others drew before."""
    shown = []
    for column in saved:
        files = [(str(file), caption) for file, caption in column.files if file.exists()]
        images = gradio.Gallery(files, columns=1 if len(files) == 1 else 2, elem_classes=classes(column))
        shown += [column.line, images]
    dimmed = [gradio.skip(), gradio.Gallery(elem_classes=[*classes(saved[-1]), "stale"])]
    return shown + dimmed * (columns - len(saved))


def classes(column: Column) -> list[str]:
    """CSS classes of a gallery."""
    return ["images", "small"] if column.small else ["images"]


def offer(column: Column) -> gradio.DownloadButton:
    """The download of a column's images."""
    file = download(column)
    return gradio.DownloadButton(value=file and str(file), interactive=file is not None)


@contextlib.contextmanager
def as_text() -> Iterator[None]:
    """Shows an invalid request as one line."""
    try:
        yield
    except ValueError as error:
        raise gradio.Error(str(error), duration=20, print_exception=False) from None


def with_names(function: Callable, names: Sequence[str]) -> Callable:
    """`function` of gradio's progress and of fields that the API calls by these names; gradio reads the signature."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    defaults = dict.fromkeys(names) | {"progress": gradio.Progress()}
    function.__signature__ = inspect.Signature(
        [inspect.Parameter(name, kind, default=default) for name, default in defaults.items()]
    )
    return function
