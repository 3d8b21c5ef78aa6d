"""The embedded CLIP as a judge: features of images and of names, and whether an image shows its prompt.

A second judge, the trunk of LPIPS, shares no weights with it and knows no words.
"""

import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from instaflow_jax import pipeline
from instaflow_jax.data.openmoji import dataset as openmoji
from instaflow_jax.data.openmoji.captions import Emoji, captions
from instaflow_jax.evals.retrieval import unit
from instaflow_jax.infra.images import to_pixels
from instaflow_jax.infra.runner import BatchedRunner
from instaflow_jax.models.clip import CLIPModel
from instaflow_jax.models.lpips import LPIPS
from instaflow_jax.models.net import Net, Params
from instaflow_jax.stages.common.loading import check_files, check_finite
from instaflow_jax.weights.tokenizer import Tokenizer

_PER_DEVICE = 64


class Judge:
    """Compares images with the real emoji and their names.

    Attributes:
      data: images and words of all emoji.
      lookalikes: an integer for each emoji; see `lookalikes`.
      real: CLIP's features of each emoji's image, [M, D], not normalised.
      real_trunk: the trunk's.
      names: CLIP's features of each emoji's full name, [M, D], not normalised.
    """

    def __init__(self, source: str, data: openmoji.Arrays):
        """`source` is a directory or hub id with lpips/ and a clip/ that uses the embedded tokenizer."""
        self.data, self.lookalikes = data, lookalikes(data)
        (net, self._params), (trunk, self._trunk_params) = load_networks(source)
        self._trunk = BatchedRunner(functools.partial(trunk.apply, method="pooled"), _PER_DEVICE)
        self._image, self._text = (
            BatchedRunner(functools.partial(net.apply, method=method), _PER_DEVICE)
            for method in ("get_image_features", "get_text_features")
        )

    def image_features(self, images: UInt8[np.ndarray, "N H W 3"]) -> Float[np.ndarray, "N D"]:
        """CLIP's features of images in bytes."""
        return self._image(self._image.place(self._params), to_pixels(images))

    def trunk_features(self, images: UInt8[np.ndarray, "N H W 3"]) -> Float[np.ndarray, "N C"]:
        """The trunk's last features, averaged over pixels, of images in bytes."""
        return self._trunk(self._trunk.place(self._trunk_params), to_pixels(images))

    @functools.cached_property
    def real_trunk(self) -> Float[np.ndarray, "M C"]:
        return self.trunk_features(self.data.images)

    @functools.cached_property
    def real(self) -> Float[np.ndarray, "M D"]:
        return self.image_features(self.data.images)

    @functools.cached_property
    def names(self) -> Float[np.ndarray, "M D"]:
        tokenizer = Tokenizer.from_pretrained(pipeline.locate("openmoji"))
        ids = openmoji.caption_ids(tokenizer, self.data.emoji)[:, 0]
        return self._text(self._text.place(self._params), ids)

    def scores(self, features: Float[np.ndarray, "N D"], wanted: Int[np.ndarray, " N"]) -> dict[str, float]:
        """How well images show the emoji they were prompted with.

        Args:
          features: CLIP's features of the images.
          wanted: the number of each image's emoji.

        Returns:
          clip_score, the mean cosine of image and name; found, the share whose nearest emoji image belongs to the
          wanted emoji or a lookalike of it; found_by_name, the same for the nearest name.
        """
        features, names = unit(features), unit(self.names)
        return {
            "clip_score": float(np.mean(np.sum(features * names[wanted], axis=1))),
            "found": float(np.mean(self.is_right((features @ unit(self.real).T).argmax(1), wanted))),
            "found_by_name": float(np.mean(self.is_right((features @ names.T).argmax(1), wanted))),
        }

    def is_right(self, found: Int[np.ndarray, " N"], wanted: Int[np.ndarray, " N"]) -> Bool[np.ndarray, " N"]:
        """Whether emoji `found` count as `wanted`: skin tones and lookalikes are ignored."""
        return self.lookalikes[found] == self.lookalikes[wanted]


def load_networks(source: str) -> list[tuple[Net, Params]]:
    """The networks in `source`/clip and `source`/lpips, and their weights.

    Raises:
      ValueError, FileNotFoundError: one is missing, or one of its files is wrong.
    """
    check_files(source)
    found = []
    for network, folder in ((CLIPModel, "clip"), (LPIPS, "lpips")):
        net, params = network.from_pretrained(source, folder)
        check_finite(f"{source}/{folder}", params)
        found.append((net, params))
    return found


def lookalikes(data: openmoji.Arrays) -> Int[np.ndarray, " M"]:
    """The same number for emoji that nobody could tell apart by their images, apart from the skin tone.

    These are the tones of one name, and names that share an identical image: "astronaut" has the image of "man
    astronaut", and Saint Martin has the flag of France.
    """
    parent: dict[str, str] = {}
    first: dict[bytes, str] = {}
    names = toneless(data.emoji)
    for name, image in zip(names, data.images, strict=True):
        parent.setdefault(name, name)
        twin = first.setdefault(image.tobytes(), name)
        parent[_root(parent, name)] = _root(parent, twin)
    return np.unique([_root(parent, name) for name in names], return_inverse=True)[1]


def toneless(emoji: Sequence[Emoji]) -> list[str]:
    """Full names without the skin tone."""
    return [captions(each)["toneless"] for each in emoji]


def _root(parent: dict[str, str], name: str) -> str:
    while parent[name] != name:
        name = parent[name]
    return name
