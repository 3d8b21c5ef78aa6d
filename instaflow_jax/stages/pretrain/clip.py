"""The embedded CLIP, which judges whether an image shows its prompt; no generator here is trained against it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from instaflow_jax.arrays import Params
from instaflow_jax.data.openmoji.captions import LEVELS, captions, level_probabilities
from instaflow_jax.data.openmoji.dataset import caption_ids
from instaflow_jax.evals.retrieval import retrieval, unit
from instaflow_jax.infra import files, images
from instaflow_jax.infra.runner import BatchedRunner
from instaflow_jax.models.clip import CLIPModel
from instaflow_jax.stages.pretrain.losses import Augment, make_clip_loss
from instaflow_jax.stages.pretrain.recipe import LoadSplit, Recipe, embedded_tokenizer

# In transformers' terms: this CLIP takes 32×32 pixels in [-1, 1].
PREPROCESSOR = {"image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"height": 32, "width": 32}}
PREPROCESSOR |= {"do_center_crop": False, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
PREPROCESSOR |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_convert_rgb": True, "resample": 3}


def make(load: LoadSplit, augment: Augment, *, model: Mapping[str, Any], empty: float) -> Recipe:
    """Trains on all emoji, because a judge has to know everything it judges.

    Args:
      model: the network's `config.json`.
      empty: share of empty captions.
    """
    net, data = CLIPModel.from_config(model), load("all")
    ids = caption_ids(embedded_tokenizer(), data.emoji)
    levels = [captions(e) for e in data.emoji]
    names = {suffix: [c[LEVELS[i]] for c in levels] for i, suffix in enumerate(("", "_toneless"))}
    embed_text = BatchedRunner(lambda params, x: net.apply(params, x, method="get_text_features"), 128)
    embed_image = BatchedRunner(lambda params, x: net.apply(params, x, method="get_image_features"), 128)

    def evaluate(params: Params, path: Path) -> dict[str, float]:
        texts, features = embed_text(params, ids[:, 0]), embed_image(params, images.to_pixels(data.images))
        similarity = unit(features) @ unit(texts).T
        found = data.images[similarity[:, : 128 * 16 : 16].argmax(0)]
        grid = images.grid(found, columns=16, row_labels=(), column_labels=(), scale=1)
        images.save_png(path, grid, {"shows": "the nearest image to every 16th caption"})
        return retrieval(similarity, names)

    def export(params: Params, directory: Path) -> None:
        net.save_pretrained(params, directory / "clip", dtype=np.float16)
        files.write_json(directory / "clip" / "preprocessor_config.json", PREPROCESSOR, indent=2)

    loss = make_clip_loss(net, augment, level_probabilities=tuple(level_probabilities(empty)))
    return Recipe(net.init, loss, {"image": data.images, "ids": ids}, evaluate, export)
