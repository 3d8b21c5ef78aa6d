"""Images: bytes ⇄ pixels, grids, PNG files."""

import contextlib
import io
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin, UnidentifiedImageError

from instaflow_jax.arrays import AnyArray
from instaflow_jax.infra.files import write_bytes, wrong_kind

GAP = 2  # pixels between the images of a grid
WHITE = 255
LABEL_HEIGHT = 16  # pixels of a line
# All that Pillow raises for a file that it cannot decode.
PILLOW_ERRORS = (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError)


def to_uint8(pixels: Float[AnyArray, "*B H W 3"]) -> UInt8[AnyArray, "*B H W 3"]:
    """Pixels in [-1, 1] (numpy or JAX), clipped and rounded, as bytes 0..255."""
    return ((pixels / 2 + 0.5).clip(0, 1) * 255).round().astype(np.uint8)


def to_pixels(images: UInt8[AnyArray, "*B H W 3"]) -> Float[AnyArray, "*B H W 3"]:
    """Bytes 0..255 (numpy or JAX) as float32 pixels in [-1, 1], the range of the networks."""
    return images.astype(np.float32) / 127.5 - 1


def grid(
    images: UInt8[np.ndarray, "N H W 3"],
    *,
    columns: int,
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    scale: int,
) -> UInt8[np.ndarray, "h w 3"]:
    """Arranges images row by row on white, with labels to the left and above.

    Args:
      columns: images per row; the last row may be shorter.
      row_labels: one per row, or () for none; the margin is as wide as the longest.
      column_labels: one per column, or () for none; in as many lines as the width of an image asks for.
      scale: integer factor by which every pixel is enlarged, for small images.

    Raises:
      ValueError: no images, or a number of labels that does not fit.
    """
    if not len(images):
        raise ValueError("a grid needs at least one image")
    rows = -(-len(images) // columns)
    for name, labels, count in (("row_labels", row_labels, rows), ("column_labels", column_labels, columns)):
        if len(labels) not in (0, count):
            raise ValueError(f"{name} has {len(labels)} labels for a grid of {count}: use one for each, or ()")
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    _, height, width, _ = images.shape
    column_labels = [_wrap(label, width) for label in column_labels]
    left, top = _margin(row_labels), LABEL_HEIGHT * max((label.count("\n") + 1 for label in column_labels), default=0)
    canvas = np.full((top + rows * (height + GAP) - GAP, left + columns * (width + GAP) - GAP, 3), WHITE, np.uint8)
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        y, x = top + row * (height + GAP), left + column * (width + GAP)
        canvas[y : y + height, x : x + width] = image
    for row, label in enumerate(row_labels):
        _write(canvas, label, y=top + row * (height + GAP), x=0, height=height, width=left)
    for column, label in enumerate(column_labels):
        _write(canvas, label, y=0, x=left + column * (width + GAP), height=top, width=width)
    return canvas


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=12)


def _margin(labels: Sequence[str]) -> int:
    return max((int(_font().getlength(label)) + 8 for label in labels), default=0)


def _wrap(label: str, width: int) -> str:
    """The label with line breaks in place of spaces where a line would be wider than `width` pixels."""
    font, lines = _font(), [""]
    for word in label.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) + 2 > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)


def _write(canvas: UInt8[np.ndarray, "h w 3"], label: str, *, y: int, x: int, height: int, width: int) -> None:
    """Draws a label at the left of a box, vertically centred; text outside the box is cut off."""
    box = Image.new("RGB", (width, height), (WHITE,) * 3)
    ImageDraw.Draw(box).text((2, height // 2), label, fill=0, font=_font(), anchor="lm", spacing=2)
    canvas[y : y + height, x : x + width] = np.asarray(box)


def save_png(path: str | Path, image: UInt8[np.ndarray, "H W 3"], text: Mapping[str, str]) -> None:
    """Writes a PNG atomically, with text (prompt, seed, ...) in its metadata."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    info = PngImagePlugin.PngInfo()
    for name, value in text.items():
        info.add_itxt(name, value)
    encoded = io.BytesIO()
    Image.fromarray(image).save(encoded, format="PNG", pnginfo=info)
    write_bytes(path, encoded.getbuffer())


def load_png(path: str | Path) -> tuple[UInt8[np.ndarray, "H W 3"], dict[str, str]]:
    """The image and the text of a PNG.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not a PNG.
    """
    with _decoding(path, "a PNG"), Image.open(path, formats=["PNG"]) as file:
        return np.asarray(file.convert("RGB")), {name: str(value) for name, value in file.text.items()}


def load_rgb(path: str | Path) -> UInt8[np.ndarray, "H W 3"]:
    """An image file in any format that Pillow reads, turned as its EXIF data say.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not an image, or is damaged.
    """
    try:
        with _decoding(path, "an image"), Image.open(path) as file:
            return np.asarray(ImageOps.exif_transpose(file).convert("RGB"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no image {path}") from error


def decode(content: bytes, where: str) -> Image.Image:
    """The bytes of an image file in any format that Pillow reads, as RGB: upright by its EXIF data, on white.

    Args:
      where: the file's name, for error messages.

    Raises:
      ValueError: it is not an image, is damaged, or has more than 8 bits per channel.
    """
    with _decoding(where, "an image"), Image.open(io.BytesIO(content)) as file:
        if file.mode.startswith(("I", "F")):  # Pillow would clip them
            raise ValueError(f"it has more than 8 bits per channel (mode {file.mode}); save it with 8")
        image = ImageOps.exif_transpose(file)
        if not image.has_transparency_data:
            return image.convert("RGB")
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def cover(image: Image.Image, height: int, width: int) -> UInt8[np.ndarray, "{height} {width} 3"]:
    """Resizes by Lanczos' filter until both sides are at least these, then crops the centre."""
    scale = max((height, image.height), (width, image.width), key=lambda sides: sides[0] / sides[1])
    size = [round(scale[0] * side / scale[1]) for side in image.size]
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    image = image if image.size == tuple(size) else image.resize(size, Image.Resampling.LANCZOS)
    return np.asarray(image.crop((left, top, left + width, top + height)))


@contextlib.contextmanager
def _decoding(path: str | Path, kind: str) -> Iterator[None]:
    """Turns whatever Pillow raises in a block that decodes `path`, but for a missing file, into a ValueError."""
    try:
        yield
    except FileNotFoundError:
        raise
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is not readable as {kind}: {_wrong_kind(path) or 'its format is unknown'}") from error
    except PILLOW_ERRORS as error:
        raise ValueError(f"{path} is not readable as {kind}: {_wrong_kind(path) or error}") from error


def _wrong_kind(path: str | Path) -> str:
    return wrong_kind(path) if Path(path).exists() else ""


def resize(image: UInt8[np.ndarray, "_ _ 3"], height: int, width: int) -> UInt8[np.ndarray, "{height} {width} 3"]:
    """The image with other sides, by Lanczos' filter; the proportions may change."""
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))
