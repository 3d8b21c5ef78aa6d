"""The embedded CLIP as a judge: features of pictures and of names, and whether a picture shows its prompt."""

import functools
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from instaflow_jax.data.openmoji import dataset as openmoji
from instaflow_jax.data.openmoji.captions import Emoji, captions
from instaflow_jax.evals.features import Spread
from instaflow_jax.models.clip import CLIPModel
from instaflow_jax.stages.pretrain.clip import unit
from instaflow_jax.stages.pretrain.recipe import caption_tokens, to_pixels

_PER_DEVICE = 64


class Judge:
    """Everything there is to know of the real emoji.

    Attributes:
      data: pictures and words of all emoji.
      kinds: an integer for each emoji; see `kinds_of`.
      pictures: CLIP's features of each picture, [M, D]; not of length one.
      names: CLIP's features of each full name, [M, D].
    """

    def __init__(self, source: str, data: openmoji.Arrays):
        """`source` is a directory or hub id with clip/, which knows the embedded tokenizer."""
        net, params = CLIPModel.from_pretrained(source, "clip")
        self.data, self.kinds = data, kinds_of(data)
        self.look = make_look(net, params)
        read = Spread(lambda p, ids: net.apply(p, ids, method="get_text_features"), params, _PER_DEVICE)
        self._texts = lambda: read(caption_tokens(data.emoji)[:, 0])

    @functools.cached_property
    def pictures(self) -> Float[np.ndarray, "M D"]:
        return self.look(self.data.images)

    @functools.cached_property
    def names(self) -> Float[np.ndarray, "M D"]:
        return self._texts()

    def scores(self, features: Float[np.ndarray, "N D"], wanted: Int[np.ndarray, " N"]) -> dict[str, float]:
        """How well pictures show the emoji they were asked for.

        Args:
          features: CLIP's, of pictures.
          wanted: which emoji each was to be.

        Returns:
          clip_score, the mean cosine of picture and name; found, the share whose nearest emoji, of all pictures of
          emoji, is of the kind wanted; found_by_name, the same by the nearest name.
        """
        features, names = unit(features), unit(self.names)
        return {
            "clip_score": float(np.mean(np.sum(features * names[wanted], axis=1))),
            "found": float(np.mean(self.is_right((features @ unit(self.pictures).T).argmax(1), wanted))),
            "found_by_name": float(np.mean(self.is_right((features @ names.T).argmax(1), wanted))),
        }

    def is_right(self, found: Int[np.ndarray, " N"], wanted: Int[np.ndarray, " N"]) -> Bool[np.ndarray, " N"]:
        """Whether emoji `found` pass for `wanted`: skin tone is forgiven, and so are twins."""
        return self.kinds[found] == self.kinds[wanted]


def make_look(net, params) -> Callable[[UInt8[np.ndarray, "N H W 3"]], Float[np.ndarray, "N D"]]:
    """A CLIP's features of pictures in bytes."""
    run = Spread(lambda p, pixels: net.apply(p, pixels, method="get_image_features"), params, _PER_DEVICE)
    return lambda images: run(to_pixels(images))


def kinds_of(data: openmoji.Arrays) -> Int[np.ndarray, " M"]:
    """Emoji that nobody could tell apart by their pictures, but for the skin tone, get the same number.

    These are the tones of one name, and names that some identical picture joins: "astronaut" is drawn as "man
    astronaut" is, and France's flag is Saint Martin's.
    """
    parent: dict[str, str] = {}
    first: dict[bytes, str] = {}
    for name, image in zip(toneless(data.emoji), data.images, strict=True):
        parent.setdefault(name, name)
        twin = first.setdefault(image.tobytes(), name)
        parent[_root(parent, name)] = _root(parent, twin)
    roots = [_root(parent, name) for name in toneless(data.emoji)]
    return np.unique(roots, return_inverse=True)[1]


def toneless(emoji: Sequence[Emoji]) -> list[str]:
    return [captions(e)["toneless"] for e in emoji]


def _root(parent: dict[str, str], name: str) -> str:
    while parent[name] != name:
        name = parent[name]
    return name
