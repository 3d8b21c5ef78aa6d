"""CLIP score (Hessel et al., 2021; here the bare cosine, as the paper reports it): does a picture show its prompt?

The networks that the paper's figures rest on are OpenCLIP's ViT-g/14, `laion/CLIP-ViT-g-14-laion2B-s12B-b42K`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

from instaflow_jax.arrays import Params, PerSample, TokenIds
from instaflow_jax.infra import files
from instaflow_jax.models.net import Net
from instaflow_jax.weights import hub

FILE = "preprocessor_config.json"
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # OpenAI's, for absent keys


def make_clip_score(net: Net) -> Callable[[Params, Float[Array, "B H W 3"], TokenIds], PerSample]:
    """The cosine of picture and prompt, `score(params, pixels, ids) → [B]`; pure, so it may be jitted and sharded.

    Args:
      net: a `models.clip.CLIPModel`.

    `pixels` have the size of the model and the values it was trained on: what `preprocess` gives, or pictures in
    [-1, 1] as they are for the embedded one. `ids` [B, L] come from the tokenizer that belongs to the model.
    """

    def score(params, pixels, ids):
        image = net.apply(params, pixels, method="get_image_features")
        return cosine(image, net.apply(params, ids, method="get_text_features"))

    return score


def cosine(a: Float[Array, "B D"], b: Float[Array, "B D"]) -> PerSample:
    """Of the angle between a's rows and b's, in float32."""
    a, b = (x.astype(jnp.float32) for x in (a, b))
    return jnp.sum(a * b, -1) / (jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1))


@dataclasses.dataclass(frozen=True)
class Preprocessor:
    """What `preprocessor_config.json` says of the way from bytes to a CLIP's pixels.

    Attributes:
      shortest: the short side after resizing, or 0 where both sides are given by `size`.
      size: (height, width) to resize to; () where `shortest` counts.
      crop: (height, width) cut from the middle; () for none.
      resample: PIL's number of the filter; 3 is bicubic.
      mean, std: of each channel in [0, 1].
    """

    shortest: int
    size: tuple[int, ...]
    crop: tuple[int, ...]
    resample: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "Preprocessor":
        """From the keys of the file; absent ones mean what they mean to transformers' CLIPImageProcessor.

        Raises:
          ValueError: a step is switched off that this port always takes, or a size is stated in no known way.
        """
        known = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_center_crop": True}
        stated = known | {key: raw[key] for key in known if key in raw}
        for key in ("do_resize", "do_rescale", "do_normalize"):
            if not stated[key]:
                raise ValueError(f"{key}={stated[key]!r} is not supported; this port always does it")
        if abs(raw.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
            raise ValueError(f"rescale_factor={raw['rescale_factor']} is not supported; bytes are divided by 255")
        size = raw.get("size", 224)
        shortest = size if isinstance(size, int) else size.get("shortest_edge", 0)
        both = () if shortest else _both(size)
        crop = _both(raw.get("crop_size", 224)) if stated["do_center_crop"] else ()
        return cls(
            shortest,
            both,
            crop,
            raw.get("resample", 3),
            tuple(raw.get("image_mean", _MEAN)),
            tuple(raw.get("image_std", _STD)),
        )

    @classmethod
    def for_plain(cls, image_size: int) -> "Preprocessor":
        """For a directory without the file: the whole picture resized to a square, values in [-1, 1]."""
        return cls(0, (image_size,) * 2, (), 3, (0.5,) * 3, (0.5,) * 3)


def _both(size: int | Mapping[str, int]) -> tuple[int, int]:
    if isinstance(size, int):
        return (size, size)
    if "height" not in size or "width" not in size:
        raise ValueError(f"size {dict(size)} names neither shortest_edge nor height and width")
    return (size["height"], size["width"])


def read_preprocessor(source: str | Path, subfolder: str, net: Net) -> Preprocessor:
    """How the CLIP of that directory or hub id wants its pictures; `for_plain` where it does not say.

    Raises:
      FileNotFoundError: neither a directory nor a hub id that can be had.
      ValueError: the file asks for something this port does not have, or for another size than the network's.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        folder = hub.snapshot(str(source), [f"{subfolder}/{FILE}" if subfolder else FILE])
    path, side = folder / subfolder / FILE, net.config.vision_config.image_size
    if not path.is_file():
        return Preprocessor.for_plain(side)
    try:
        preprocessor = Preprocessor.from_dict(files.read_json(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if (preprocessor.crop or preprocessor.size) != (side, side):
        raise ValueError(
            f"{path} makes pictures of {preprocessor.crop or preprocessor.size}, but the network beside "
            f"it takes {side}×{side}"
        )
    return preprocessor


def preprocess(images: UInt8[np.ndarray, "B H W 3"], how: Preprocessor) -> Float[np.ndarray, "B h w 3"]:
    """Bytes to a CLIP's pixels, on the host: resized by PIL, cut from the middle, normalised.

    As transformers' CLIPImageProcessor to 1e-5. It resizes bytes to bytes, so PIL does it here too: a resize in
    floats is half a grey level off.
    """
    pixels = np.stack([_crop(_resize(image, how), how.crop) for image in images]).astype(np.float32) / 255
    return (pixels - np.float32(how.mean)) / np.float32(how.std)


def _resize(image: UInt8[np.ndarray, "H W 3"], how: Preprocessor) -> UInt8[np.ndarray, "h w 3"]:
    height, width = how.size or _keep_shape(image.shape[:2], how.shortest)
    return np.asarray(Image.fromarray(image).resize((width, height), resample=how.resample))


def _keep_shape(shape: tuple[int, ...], shortest: int) -> tuple[int, int]:
    """The long side is rounded down, as transformers rounds it."""
    height, width = (int(shortest * side / min(shape)) for side in shape)
    return height, width


def _crop(image: UInt8[np.ndarray, "H W 3"], crop: tuple[int, ...]) -> UInt8[np.ndarray, "h w 3"]:
    """The middle; where the picture is smaller, black around it."""
    if not crop:
        return image
    margins = [max(0, want - have) for want, have in zip(crop, image.shape[:2], strict=True)]
    # an odd margin is larger above and left, as in transformers
    image = np.pad(image, [*((margin - margin // 2, margin // 2) for margin in margins), (0, 0)])
    top, left = ((have - want) // 2 for want, have in zip(crop, image.shape[:2], strict=True))
    return image[top : top + crop[0], left : left + crop[1]]
