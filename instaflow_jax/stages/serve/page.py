"""The page of `serve`, in gradio; it loads nothing from other servers and sends nothing to them."""

import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio reads it when it is imported

import contextlib
import logging
import random
from collections.abc import Callable, Iterator, Sequence

import gradio
from PIL import Image

from instaflow_jax.stages.serve.models import SEEDS, Model, Respond, Result, heading

SMALL = 256  # images with fewer pixels a side are enlarged without smoothing
# Fonts of the visitor's own system; gradio's theme would load its fonts from the internet.
THEME = gradio.themes.Default(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace"))
CSS = """
.gradio-container { width: 100% !important; max-width: 1000px !important; margin: 0 auto !important; }
.images img { image-rendering: auto; }
.images.small img { image-rendering: pixelated; }
"""
UPLOAD = "10mb"  # largest condition image
TITLE = "InstaFlow in JAX"
COMPARISON = "A one-step model beside its teacher. Both start from the same noise."
ALONE = "Text to image."


def make_page(
    models: Sequence[Model],
    respond: Respond,
    *,
    notice: str,
    examples: Sequence[str],
    max_chars: int,
    max_images: int,
    controls: Sequence[str] = (),
) -> gradio.Blocks:
    """The page, not yet served.

    Args:
      models: shown side by side.
      respond: from `make_respond`.
      notice: a line above everything else, '' for none.
      examples: prompts to click on; the first fills the prompt field.
      max_chars: characters that the prompt field takes.
      max_images: the largest number of images of a request.
      controls: names of the ControlNets; the page asks for an image for each.
    """
    choices = models[0].choices
    with gradio.Blocks(title=TITLE, fill_width=True, analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gradio.Markdown(f"# {TITLE}\n{COMPARISON if len(models) > 1 else ALONE}")
        if notice:
            gradio.Markdown(f"*{notice}*")
        prompt = gradio.Textbox(label="Prompt", value=examples[0], max_length=max_chars, max_lines=3, autofocus=True)
        with gradio.Row(equal_height=True):
            N = gradio.Radio(choices, value=choices[0], label="Steps", interactive=len(choices) > 1)
            seed = gradio.Number(0, label="Seed", minimum=0, maximum=SEEDS - max_images, precision=0)
            count = gradio.Radio(range(1, max_images + 1), value=1, label="Images")
        files = [gradio.File(label=f"Image for {name}", file_types=["image"], height=120) for name in controls]
        with gradio.Row():
            draw = gradio.Button("Draw", variant="primary")
            reseed = gradio.Button("Draw with another seed")
        waiting = gradio.Markdown(min_height=40)  # shows the place in the queue and the elapsed seconds
        with gradio.Row():
            outputs = [field for model in models for field in make_column(model)]
        gradio.Examples([[example] for example in examples], prompt)
        answer = make_answer(respond, len(models))
        inputs = [prompt, seed, N, count, *files]
        options = {"concurrency_limit": 1, "concurrency_id": "device", "show_progress_on": waiting}
        gradio.on([draw.click, prompt.submit], answer, inputs, outputs, api_name="draw", **options)
        reseed.click(lambda: random.randrange(2**31), None, seed, api_visibility="private", queue=False).then(
            answer, inputs, outputs, api_visibility="private", **options
        )
    return page


def make_column(model: Model) -> tuple[gradio.Markdown, gradio.Gallery]:
    """The heading and the gallery of one model."""
    with gradio.Column(min_width=240):
        title = gradio.Markdown(f"### {heading(model.title, model.choices[0])}")
        style = {"object_fit": "contain", "format": "png", "interactive": False, "elem_classes": ["images"]}
        gallery = gradio.Gallery(show_label=False, columns=2, **style)
    return title, gallery


def make_answer(respond: Respond, columns: int) -> Callable[..., Iterator[list]]:
    """The buttons' function: fills one column after the other; an invalid request is shown as text."""

    def answer(prompt, seed, N, count, *files):
        shown = [gradio.skip() for _ in range(2 * columns)]
        try:
            for column, result in enumerate(respond(prompt, seed, N, count, *files)):
                shown[2 * column : 2 * column + 2] = [describe(result), show(result)]
                yield shown
        except ValueError as error:
            raise gradio.Error(str(error), duration=20, print_exception=False) from None

    # gradio looks for a generator function, which the run-time type checker's wrapper around `answer` is not.
    return lambda prompt, seed, N, count, *files: (yield from answer(prompt, seed, N, count, *files))


def describe(result: Result) -> str:
    """The model, its solver steps and the mean seconds, in Markdown."""
    mean = sum(result.seconds) / len(result.seconds)
    each = "" if len(result.seconds) == 1 else " per image"
    return f"### {result.heading} · {mean:.3f} s{each}"


def show(result: Result) -> gradio.Gallery:
    """The images, each with its seed below."""
    images = [(Image.fromarray(image), f"seed {seed}") for image, seed in zip(result.images, result.seeds, strict=True)]
    small = ["small"] if result.images[0].shape[0] < SMALL else []
    return gradio.Gallery(images, columns=1 if len(images) == 1 else 2, elem_classes=["images", *small])


def open_page(page: gradio.Blocks, *, host: str, port: int, queue: int, uploads: bool = False) -> str:
    """Serves the page from a thread and returns its address; requests run one at a time, and up to `queue` wait.

    Args:
      uploads: whether visitors may send files, of up to `UPLOAD`.

    Raises:
      OSError: the port is taken.
    """
    logging.getLogger("httpx").setLevel(logging.WARNING)  # gradio calls its own page at the start
    page.queue(max_size=queue, api_open=False)  # an open API would let requests skip the queue
    off = ("share", "inbrowser", "ssr_mode", "pwa", "mcp_server", "enable_monitoring")
    with without_proxies():
        _, url, _ = page.launch(
            server_name=host,
            server_port=port,
            prevent_thread_lock=True,
            quiet=True,
            show_error=True,
            max_file_size=UPLOAD if uploads else 1,
            footer_links=[],
            theme=THEME,
            css=CSS,
            **dict.fromkeys(off, False),
        )
    return url


@contextlib.contextmanager
def without_proxies() -> Iterator[None]:
    """Hides `http_proxy` and its kin: gradio calls its own page at the start, which no proxy reaches."""
    names = ("no_proxy", "NO_PROXY")
    before = {name: os.environ[name] for name in names if name in os.environ}
    os.environ.update(dict.fromkeys(names, "*"))
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)
        os.environ.update(before)
