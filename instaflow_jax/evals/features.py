"""The features of an FID: Inception's, from the weights that pytorch-fid uses."""

from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
from jaxtyping import Array, PyTree

from instaflow_jax.models.inception import InceptionV3

# function(weights, images uint8 [B, H, W, 3]) → [B, D], and its weights
FeatureNet = tuple[Callable[..., Array], PyTree]


def load_inception(path: str | Path) -> FeatureNet:
    """Inception's 2048 features of images in bytes, from pytorch-fid's weight file.

    Raises:
      FileNotFoundError: there is no such file; says where to download it.
      ValueError: its weights do not fit this network.
    """
    check_inception(path)
    net, params = InceptionV3.from_file(path)
    return lambda params, images: net.apply(params, images.astype(jnp.float32) / 255), params


def check_inception(path: str | Path) -> None:
    """Raises FileNotFoundError, saying where to download the file, unless it exists."""
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"{path} is missing: the FID needs pytorch-fid's weights, pt_inception-2015-12-05-6726825d.pth, from "
            "https://github.com/mseitzer/pytorch-fid/releases/tag/fid_weights"
        )
