"""The page of `serve`, in gradio: nothing is fetched from elsewhere, nothing is told to anybody."""

import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read while gradio is imported

import logging
import random
from collections.abc import Callable, Iterator, Sequence

import gradio
from PIL import Image

from instaflow_jax.stages.serve.stage import SEEDS, Drawn, Painter, Respond

SMALL = 256  # pixels; smaller pictures are enlarged without smoothing
# Fonts of the visitor's own system, where gradio's theme would name others.
THEME = gradio.themes.Default(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace"))
CSS = """
.gradio-container { width: 100% !important; max-width: 1000px !important; margin: 0 auto !important; }
.pictures img { image-rendering: auto; }
.pictures.small img { image-rendering: pixelated; }
"""
INTRODUCTION = (
    "# InstaFlow in JAX\nFrom prompt to picture in one step, beside its teacher. Both begin from the same noise."
)
ALONE = "# InstaFlow in JAX\nFrom prompt to picture."


def make_page(
    painters: Sequence[Painter],
    respond: Respond,
    *,
    notice: str,
    examples: Sequence[str],
    max_chars: int,
    max_pictures: int,
) -> gradio.Blocks:
    """The page, not yet served.

    Args:
      painters: what is shown side by side.
      notice: a line to show above all, '' for none.
      examples: prompts to click on.
      max_chars: length of the prompt's field.
      max_pictures: where the number of pictures ends.
    """
    counts = painters[0].counts
    with gradio.Blocks(
        title="InstaFlow in JAX", fill_width=True, analytics_enabled=False, delete_cache=(3600, 3600)
    ) as page:
        gradio.Markdown(INTRODUCTION if len(painters) > 1 else ALONE)
        if notice:
            gradio.Markdown(f"*{notice}*")
        prompt = gradio.Textbox(label="Prompt", value=examples[0], max_length=max_chars, max_lines=3, autofocus=True)
        with gradio.Row(equal_height=True):
            steps = gradio.Radio(counts, value=counts[0], label="Steps", interactive=len(counts) > 1)
            seed = gradio.Number(0, label="Seed", minimum=0, maximum=SEEDS - max_pictures, precision=0)
            pictures = gradio.Radio(range(1, max_pictures + 1), value=1, label="Pictures")
        with gradio.Row():
            draw = gradio.Button("Draw", variant="primary")
            again = gradio.Button("Draw with another seed")
        waiting = gradio.Markdown(min_height=40)  # where the place in the queue and the seconds gone are shown
        with gradio.Row():
            outputs = [field for painter in painters for field in make_column(painter)]
        gradio.Examples([[example] for example in examples], prompt)
        answer = make_answer(respond, len(painters))
        inputs = [prompt, seed, steps, pictures]
        options = {"concurrency_limit": 1, "concurrency_id": "device", "show_progress_on": waiting}
        gradio.on([draw.click, prompt.submit], answer, inputs, outputs, api_name="draw", **options)
        again.click(lambda: random.randrange(2**31), None, seed, api_visibility="private", queue=False).then(
            answer, inputs, outputs, api_visibility="private", **options
        )
    return page


def make_column(painter: Painter) -> tuple[gradio.Markdown, gradio.Gallery]:
    """The line and the pictures of one painter."""
    with gradio.Column(min_width=240):
        line = gradio.Markdown(f"### `{painter.title}`")
        gallery = gradio.Gallery(
            show_label=False,
            columns=2,
            object_fit="contain",
            format="png",
            interactive=False,
            elem_classes=["pictures"],
        )
    return line, gallery


def make_answer(respond: Respond, columns: int) -> Callable[..., Iterator[list]]:
    """What the button calls: fills the columns one after the other, and shows what is wrong with a request as text."""

    def answer(prompt, seed, steps, pictures):
        shown = [gradio.skip() for _ in range(2 * columns)]
        try:
            for column, drawn in enumerate(respond(prompt, seed, steps, pictures)):
                shown[2 * column : 2 * column + 2] = [describe(drawn), show(drawn)]
                yield shown
        except ValueError as error:
            raise gradio.Error(str(error), duration=20, print_exception=False) from None

    return answer


def describe(drawn: Drawn) -> str:
    """Model, steps and seconds, in Markdown."""
    mean = sum(drawn.seconds) / len(drawn.seconds)
    steps = "1 step" if drawn.N == 1 else f"{drawn.N} steps"
    each = "" if len(drawn.seconds) == 1 else " a picture"
    return f"### {steps} · {mean:.3f} s{each}\n`{drawn.title}`"


def show(drawn: Drawn) -> gradio.Gallery:
    """The pictures with their seeds below."""
    pictures = [
        (Image.fromarray(picture), f"seed {seed}") for picture, seed in zip(drawn.pictures, drawn.seeds, strict=True)
    ]
    size = ["small"] if drawn.pictures[0].shape[0] < SMALL else []
    return gradio.Gallery(pictures, columns=1 if len(pictures) == 1 else 2, elem_classes=["pictures", *size])


def open_page(page: gradio.Blocks, *, host: str, port: int, queue: int) -> str:
    """Serves the page from a thread and gives its address; `queue` requests may wait, one is drawn at a time.

    Raises:
      OSError: the port is taken.
    """
    logging.getLogger("httpx").setLevel(logging.WARNING)  # its calls of the page itself
    page.queue(max_size=queue, api_open=False)  # or requests could go past the queue
    _, url, _ = page.launch(
        server_name=host,
        server_port=port,
        share=False,
        prevent_thread_lock=True,
        quiet=True,
        inbrowser=False,
        show_error=True,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        max_file_size=1,
        footer_links=[],
        theme=THEME,
        css=CSS,
    )
    return url
