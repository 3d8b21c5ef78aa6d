"""What a visitor has drawn: the page's fields, and a PNG with its settings for each image; usable without gradio."""

import dataclasses
import secrets
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from instaflow_jax.infra import images
from instaflow_jax.infra.messages import slug
from instaflow_jax.stages.serve.requests import Result

KEPT = 24  # drawings that the gallery of a session shows
SMALL = 256  # images with fewer pixels a side are enlarged without smoothing


@dataclasses.dataclass(frozen=True)
class Column:
    """The images of one model, as the page shows them.

    Attributes:
      line: heading with the seconds, in Markdown.
      files: PNGs, with what is below each.
      small: whether they are enlarged without smoothing.
    """

    line: str
    files: list[tuple[Path, str]]
    small: bool


@dataclasses.dataclass(frozen=True)
class Drawing:
    """One answer of the page.

    Attributes:
      fields: the values of the page's fields.
      columns: one for each model that has drawn so far.
      passing: whether it was drawn while the slider moved.
    """

    fields: tuple[Any, ...]
    columns: tuple[Column, ...]
    passing: bool = False

    @property
    def there(self) -> bool:
        """Whether its files still exist."""
        return all(file.exists() for column in self.columns for file, _ in column.files)

    def remove(self) -> None:
        """Deletes its files."""
        for column in self.columns:
            for file, _ in column.files:
                file.unlink(missing_ok=True)


def save(result: Result, folder: Path) -> Column:
    """Writes the images of a result into folders of their own in `folder`, whose names nobody can guess."""
    mean = sum(result.seconds) / len(result.seconds)
    line = f"### {result.heading} · {mean:.3f} s{'' if len(result.seconds) == 1 else ' per image'}"
    files = []
    for settings, image, text in zip(result.settings, result.images, result.metadata, strict=True):
        walk = f" to {settings.second_seed} at {settings.position:g}" if settings.position else ""
        name = f"{slug(settings.prompt)}_seed{settings.seed}{walk.replace(' ', '_')}_N{settings.N}.png"
        path = folder / secrets.token_hex(16) / name
        images.save_png(path, image, text)
        files.append((path, f"seed {settings.seed}{walk}"))
    return Column(line, files, result.images[0].shape[0] < SMALL)


def download(column: Column) -> Path | None:
    """The PNG of a column, or a zip of its PNGs; None if they are gone."""
    paths = [path for path, _ in column.files if path.exists()]
    if len(paths) <= 1:
        return paths[0] if paths else None
    bundle = paths[0].with_suffix(".zip")
    with zipfile.ZipFile(bundle, "w") as file:
        for path in paths:
            file.write(path, path.name)
    return bundle


def remember(drawing: Drawing, session: Sequence[Drawing]) -> list[Drawing]:
    """The session with a new drawing in front, at most `KEPT` long, without those whose files are gone."""
    return [drawing, *(old for old in session if old.fields != drawing.fields and old.there)][:KEPT]
