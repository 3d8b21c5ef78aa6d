"""The embedded CLIP, which judges whether a picture shows its prompt; no picture maker here is trained against it."""

import json
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from instaflow_jax.data.openmoji.captions import LEVELS, Emoji, captions, level_probabilities
from instaflow_jax.infra import files, images
from instaflow_jax.models.clip import CLIPModel
from instaflow_jax.stages.pretrain import losses as pretraining
from instaflow_jax.stages.pretrain.recipe import Recipe, caption_tokens, in_batches, load, make_augment, to_pixels

# Pixels in [-1, 1] are what this CLIP sees, said in transformers' words.
PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "do_resize": True,
    "size": {"height": 32, "width": 32},
    "do_center_crop": False,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "do_convert_rgb": True,
    "resample": 3,
}


def make(config: ConfigDict, workdir: str) -> Recipe:
    """Trained on all emoji, since a judge has to know all that it judges."""
    net = CLIPModel.from_config(config.model.to_dict())
    data = load(config, workdir, "all")
    tokens = caption_tokens(data.emoji)
    text = jax.jit(lambda params, ids: net.apply(params, ids, method="get_text_features"))
    image = jax.jit(lambda params, x: net.apply(params, x, method="get_image_features"))

    def watch(params, path: Path) -> dict[str, float]:
        texts = in_batches(lambda ids: text(params, ids), 128, tokens[:, 0])
        pictures = in_batches(lambda x: image(params, x), 128, to_pixels(data.images))
        similarity = unit(pictures) @ unit(texts).T
        found = data.images[similarity[:, : 128 * 16 : 16].argmax(0)]
        grid = images.grid(found, columns=16, row_labels=(), column_labels=(), scale=1)
        images.save_png(path, grid, {"shows": "the picture nearest to every 16th caption"})
        return retrieval(similarity, data.emoji)

    def export(params, directory: Path) -> None:
        net.save_pretrained(params, directory / "clip", dtype=np.float16)
        with files.atomic_write(directory / "clip" / "preprocessor_config.json") as temporary:
            temporary.write_text(json.dumps(PREPROCESSOR, indent=2) + "\n")

    loss = pretraining.make_clip_loss(
        net, make_augment(config), lambda pixels: pixels, level_probabilities=tuple(level_probabilities(config.empty))
    )
    return Recipe(net.init, loss, {"image": data.images, "tokens": tokens}, watch, export)


def unit(x: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N D"]:
    """Rows of length one."""
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def retrieval(similarity: Float[np.ndarray, "N N"], emoji: list[Emoji]) -> dict[str, float]:
    """The share of pictures whose nearest full name is theirs, and of names whose nearest picture is, among all.

    `_toneless` forgives a wrong skin tone.
    """
    scores = {}
    for level, ending in ((LEVELS[0], ""), (LEVELS[1], "_toneless")):
        names = np.array([captions(e)[level] for e in emoji])
        scores[f"image_to_text{ending}"] = float(np.mean(names[similarity.argmax(1)] == names))
        scores[f"text_to_image{ending}"] = float(np.mean(names[similarity.argmax(0)] == names))
    return scores
