"""The figures that InstaFlow's authors report for their own models and others (arXiv 2309.06380), to set ours beside.

Seconds an image: batch 1 on an A100, text encoder and decoder included.
"""

from typing import NamedTuple


class Figure(NamedTuple):
    """One row of a table of the paper; None where no number is known.

    Attributes:
      N: solver steps.
      seconds: an image.
    """

    model: str
    N: int | None
    seconds: float | None
    fid: float
    clip_score: float | None


class Table(NamedTuple):
    """A table of the paper, and the images that it is about."""

    images: str
    figures: tuple[Figure, ...]


TABLE_1 = Table(
    "COCO 2017, 5,000 captions, 512×512 pixels",
    (
        Figure("Stable Diffusion 1.5", 25, 0.88, 20.1, 0.318),
        Figure("2-rectified flow", 25, 0.88, 21.5, 0.315),
        Figure("2-rectified flow", 1, 0.09, 47.0, 0.271),
        Figure("Stable Diffusion, distilled progressively", 1, 0.09, 37.2, 0.275),
        Figure("Stable Diffusion, distilled progressively", 2, 0.13, 26.0, 0.297),
        Figure("Stable Diffusion, distilled progressively", 4, 0.21, 26.4, 0.300),
        Figure("Stable Diffusion 1.4, distilled directly", 1, 0.09, 40.9, 0.255),
        Figure("2-rectified flow, distilled (short training)", 1, 0.09, 31.0, 0.285),
        Figure("InstaFlow-0.9B: the same, trained for longer", 1, 0.09, 23.4, 0.304),
        Figure("InstaFlow-1.7B: as a Stacked U-Net", 1, 0.12, 22.4, 0.309),
    ),
)
TABLE_2 = Table(
    "COCO 2014, 30,000 captions, 256×256 pixels",
    (
        Figure("Stable Diffusion", 50, None, 9.6, None),
        Figure("2-rectified flow", 25, None, 11.1, None),
        Figure("InstaFlow-0.9B", 1, None, 13.1, None),
        Figure("InstaFlow-1.7B", 1, None, 11.8, None),
        Figure("StyleGAN-T", None, 0.10, 13.9, None),
    ),
)
TABLES = {1: TABLE_1, 2: TABLE_2}
