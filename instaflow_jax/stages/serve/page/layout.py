"""What the page of `serve` shows: its fields, and a column of images for each model."""

from collections.abc import Sequence

import gradio

from instaflow_jax.stages.serve.models import Model, heading
from instaflow_jax.stages.serve.page.events import Fields, ModelColumn, Parts, listen
from instaflow_jax.stages.serve.requests import Respond

TITLE = "InstaFlow in JAX"
COMPARISON = "A one-step model beside its teacher. Both start from the same noise."
ALONE = "Text to image."
KEEP = 3600  # seconds that the files of images are kept


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
    """The page, not yet served. The Tab key goes from the prompt to the button that draws, then to the rest.

    Args:
      models: shown side by side.
      respond: from `make_respond`.
      notice: a line above everything else, '' for none.
      examples: prompts to click on; the first fills the prompt field.
      max_chars: characters that the prompt field takes.
      max_images: the largest number of images of a request.
      controls: names of the ControlNets; the page asks for an image for each.
    """
    with gradio.Blocks(title=TITLE, fill_width=True, analytics_enabled=False, delete_cache=(KEEP, KEEP)) as page:
        gradio.Markdown(f"# {TITLE}\n{COMPARISON if len(models) > 1 else ALONE}")
        if notice:
            gradio.Markdown(f"*{notice}*")
        prompt = gradio.Textbox(label="Prompt", value=examples[0], max_length=max_chars, max_lines=3, autofocus=True)
        with gradio.Row():
            draw = gradio.Button("Draw", variant="primary", min_width=120)
            reseed = gradio.Button("Another seed", min_width=120)
        gradio.Examples([[example] for example in examples], prompt)
        files = {f"image_{i}": make_file(name) for i, name in enumerate(controls)}
        waiting = gradio.Markdown(min_height=48, elem_classes=["waiting"])
        with gradio.Row(elem_classes=["columns"]):
            columns = [make_column(model) for model in models]
        walk = make_walk()
        options = make_options(models, max_images)
        guidance = make_guidance(models, max_chars)
        style = {"object_fit": "contain", "interactive": False, "elem_classes": ["images", "session"]}
        session = gradio.Gallery(label="This session", visible=False, allow_preview=False, height="auto", **style)
        fields = {"prompt": prompt, "seed": walk.pop("seed"), **options, **files, **walk, **guidance}
        listen(Parts(fields, draw, reseed, waiting, columns, session), respond)
    return page


# ---------------------------------------------------------------- fields


def make_column(model: Model) -> ModelColumn:
    """Heading, images and download of one model."""
    with gradio.Column(min_width=150):
        title = gradio.Markdown(f"### {heading(model.title, model.choices[0])}")
        style = {"object_fit": "contain", "interactive": False, "elem_classes": ["images"]}
        images = gradio.Gallery(show_label=False, columns=2, buttons=["download", "fullscreen"], **style)
        download = gradio.DownloadButton("Download", size="md", interactive=False)
    return ModelColumn(title, images, download)


def make_file(name: str) -> gradio.File:
    """The condition image of a ControlNet."""
    return gradio.File(label=f"Image for {name}", file_types=["image"], height=120)


def make_walk() -> Fields:
    """Two seeds, and the position between their noises."""
    seeds = {"precision": 0, "min_width": 120}
    with gradio.Group():
        position = gradio.Slider(0, 1, value=0, step=0.01, label="Walk from the seed to the second seed", buttons=[])
        with gradio.Row():
            seed = gradio.Number(0, label="Seed", **seeds)
            second_seed = gradio.Number(1, label="Second seed", **seeds)
    return {"seed": seed, "second_seed": second_seed, "position": position}


def make_options(models: Sequence[Model], max_images: int) -> Fields:
    """Numbers of solver steps and of images."""
    choices = models[0].choices
    with gradio.Row(equal_height=True):
        N = gradio.Radio(choices, value=choices[0], label="Steps", interactive=len(choices) > 1, min_width=120)
        count = gradio.Radio(range(1, max_images + 1), value=1, label="Images", min_width=120)
    return {"N": N, "count": count}


def make_guidance(models: Sequence[Model], max_chars: int) -> Fields:
    """Negative prompt, and guidance of each model that takes it; nothing if none does."""
    guided = [model for model in models if model.guided]
    if not guided:
        return {}
    alone = f" of the {guided[0].title}" if len(guided) < len(models) else ""
    with gradio.Row():
        label, limits = f"Negative prompt{alone}", {"max_length": max_chars, "max_lines": 3}
        fields = {"negative": gradio.Textbox(label=label, scale=3, min_width=240, **limits)}
        for model in guided:
            label = f"Guidance{f' of the {model.title}' if model.title and len(models) > 1 else ''}"
            fields[f"{model.title}_alpha".strip("_")] = gradio.Number(model.alpha, label=label, step=0.5, min_width=180)
    return fields
