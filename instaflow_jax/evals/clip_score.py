"""CLIP score (Hessel et al., 2021; the bare cosine, as in the InstaFlow paper): does an image show its prompt?

The paper uses OpenCLIP's ViT-g/14, `laion/CLIP-ViT-g-14-laion2B-s12B-b42K`.
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
from instaflow_jax.infra import files, stores
from instaflow_jax.models.net import Net
from instaflow_jax.weights import hub

FILE, NESTED = "preprocessor_config.json", "processor_config.json"  # transformers 5 writes only the second
_MEAN, _STD = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)  # OpenAI's, for keys the file leaves out


def make_clip_score(net: Net) -> Callable[[Params, Float[Array, "B H W 3"], TokenIds], PerSample]:
    """The cosine of image and prompt, `score(params, pixels, ids) → [B]`; pure, so it may be jitted and sharded.

    Args:
      net: a `models.clip.CLIPModel`. It takes `pixels` as `preprocess` makes them (for the embedded CLIP these are
        images in [-1, 1]), and `ids` [B, L] from its own tokenizer.
    """

    def score(params, pixels, ids):
        image = net.apply(params, pixels, method="get_image_features")
        return cosine(image, net.apply(params, ids, method="get_text_features"))

    return score


def cosine(a: Float[Array, "B D"], b: Float[Array, "B D"]) -> PerSample:
    """The cosine of the angle between each row of a and the same row of b, in float32."""
    a, b = (x.astype(jnp.float32) for x in (a, b))
    return jnp.sum(a * b, -1) / (jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1))


@dataclasses.dataclass(frozen=True)
class Preprocessor:
    """How a CLIP's `preprocessor_config.json` turns bytes into pixels.

    Attributes:
      shortest: the short side after resizing, or 0 if `size` gives both sides.
      size: (height, width) to resize to, or () if `shortest` does.
      crop: (height, width) cut from the middle, or () for no crop.
      resample: PIL's number for the filter; 3 is bicubic.
      mean, std: per channel, for values in [0, 1].
    """

    shortest: int
    size: tuple[int, ...]
    crop: tuple[int, ...]
    resample: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "Preprocessor":
        """From the keys of the file; missing keys take the defaults of transformers' CLIPImageProcessor.

        Raises:
          ValueError: the file turns off a step that this port always takes, or states a size in an unknown way.
        """
        raw = {key: value for key, value in raw.items() if value is not None}
        known = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_center_crop": True}
        stated = known | {key: raw[key] for key in known if key in raw}
        for key in ("do_resize", "do_rescale", "do_normalize"):
            if not stated[key]:
                raise ValueError(f"{key}={stated[key]!r} is not supported; only true is")
        if abs(raw.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
            raise ValueError(f"rescale_factor={raw['rescale_factor']} is not supported; only 1/255 is")
        for key in ("size", "crop_size"):
            if not isinstance(raw.get(key, 224), int | Mapping):
                raise ValueError(f"{key}={raw[key]!r} is not supported; use a number or an object")
        size = raw.get("size", 224)
        shortest = size if isinstance(size, int) else size.get("shortest_edge") or 0
        both = () if shortest else _both(size)
        crop = _both(raw.get("crop_size", 224)) if stated["do_center_crop"] else ()
        mean, std = tuple(raw.get("image_mean", _MEAN)), tuple(raw.get("image_std", _STD))
        return cls(shortest, both, crop, raw.get("resample", 3), mean, std)


def _both(size: int | Mapping[str, int]) -> tuple[int, int]:
    if isinstance(size, int):
        return (size, size)
    if "height" not in size or "width" not in size:
        raise ValueError(f"size {dict(size)} names neither shortest_edge nor height and width")
    return (size["height"], size["width"])


def read_preprocessor(source: str | Path, subfolder: str, net: Net) -> Preprocessor:
    """The preprocessing of a CLIP in a directory or at a hub id, as transformers 4 or 5 saves it.

    Raises:
      FileNotFoundError: `source` is neither a directory nor a hub id that can be downloaded, or it has no such file.
      ValueError: the file asks for an unsupported step, or for a size other than the network's.
    """
    folder = stores.local(source)
    if not folder.is_dir():
        folder = hub.snapshot(str(source), [f"{subfolder}/{n}" if subfolder else n for n in (FILE, NESTED)])
    path, side = folder / subfolder / FILE, net.config.vision_config.image_size
    raw = files.read_json(path) if path.exists() else None
    if raw is None and (folder / subfolder / NESTED).exists():
        path = folder / subfolder / NESTED
        raw = files.read_json(path).get("image_processor")
    if raw is None:
        raise FileNotFoundError(
            f"{folder / subfolder} has neither {FILE} nor {NESTED} with an image_processor, so its pixels cannot be "
            "normalised; copy the file from where the weights come from"
        )
    if not isinstance(raw, Mapping):
        raise ValueError(f"{path}: image_processor={raw!r} is not supported; use an object with its fields")
    try:
        preprocessor = Preprocessor.from_dict(raw)
    except (ValueError, TypeError, AttributeError) as error:  # the last two: a value of another type
        raise ValueError(f"{path}: {error}") from error
    if (preprocessor.crop or preprocessor.size) != (side, side):
        raise ValueError(
            f"{path} makes images of {preprocessor.crop or preprocessor.size}, but the network beside "
            f"it takes {side}×{side}"
        )
    return preprocessor


def preprocess(images: UInt8[np.ndarray, "B H W 3"], how: Preprocessor) -> Float[np.ndarray, "B h w 3"]:
    """Bytes to a CLIP's pixels, on the host: resized, cropped in the middle, normalised.

    Agrees with transformers' CLIPImageProcessor to 1e-5. Like that one it resizes bytes to bytes with PIL; resizing
    floats would be off by half a grey level.
    """
    pixels = np.stack([_crop(_resize(image, how), how.crop) for image in images]).astype(np.float32) / 255
    return (pixels - np.float32(how.mean)) / np.float32(how.std)


def _resize(image: UInt8[np.ndarray, "H W 3"], how: Preprocessor) -> UInt8[np.ndarray, "h w 3"]:
    height, width = how.size or _keep_shape(image.shape[:2], how.shortest)
    return np.asarray(Image.fromarray(image).resize((width, height), resample=how.resample))


def _keep_shape(shape: tuple[int, ...], shortest: int) -> tuple[int, int]:
    """The short side becomes `shortest`; the long side is rounded down, as in transformers."""
    height, width = (int(shortest * side / min(shape)) for side in shape)
    return height, width


def _crop(image: UInt8[np.ndarray, "H W 3"], crop: tuple[int, ...]) -> UInt8[np.ndarray, "h w 3"]:
    """The middle of the image, padded with black where the image is smaller."""
    if not crop:
        return image
    margins = [max(0, want - have) for want, have in zip(crop, image.shape[:2], strict=True)]
    # an odd margin is larger at the top and left, as in transformers
    image = np.pad(image, [*((margin - margin // 2, margin // 2) for margin in margins), (0, 0)])
    top, left = ((have - want) // 2 for want, have in zip(crop, image.shape[:2], strict=True))
    return image[top : top + crop[0], left : left + crop[1]]
