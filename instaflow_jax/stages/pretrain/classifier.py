"""The embedded LPIPS: a small VGG trained to classify the subgroups of emoji; its features measure distances."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from instaflow_jax.arrays import Params
from instaflow_jax.data.openmoji.groups import SUBGROUPS
from instaflow_jax.infra import files, images
from instaflow_jax.infra.runner import BatchedRunner
from instaflow_jax.models.lpips import LPIPS, VGGClassifier
from instaflow_jax.stages.pretrain.losses import Augment, make_classifier_loss
from instaflow_jax.stages.pretrain.recipe import LoadSplit, Recipe

CLASSES = tuple(sorted(SUBGROUPS))


def make(load: LoadSplit, augment: Augment, *, model: Mapping[str, Any], loss: Mapping[str, float]) -> Recipe:
    """Trains on the split "train" and evaluates on "heldout", which shares no emoji with it in any tone or gender.

    Args:
      model: `config.json` of LPIPS, whose trunk is trained.
      loss: keywords of `make_classifier_loss`.
    """
    net = VGGClassifier.from_config({**model, "num_classes": len(CLASSES)})
    known, held_out = load("train"), load("heldout")
    labels, truth = ([CLASSES.index(e.subgroup) for e in data.emoji] for data in (known, held_out))
    classify = BatchedRunner(net.apply, 62)

    def evaluate(params: Params, path: Path) -> dict[str, float]:
        guess = classify(params, images.to_pixels(held_out.images)).argmax(1)
        shown = held_out.images[np.argsort(guess, kind="stable")]
        grid = images.grid(shown, columns=20, row_labels=(), column_labels=(), scale=1)
        images.save_png(path, grid, {"shows": "held-out emoji in the order of their predicted subgroup"})
        return {"heldout_accuracy": float(np.mean(guess == truth))}

    def export(params: Params, directory: Path) -> None:
        lpips = LPIPS.from_config(model)
        lpips.save_pretrained(with_heads(params, lpips.shapes), directory / "lpips", dtype=np.float16)
        net.save_pretrained(params, directory / "classifier", dtype=np.float16)
        files.write_json(directory / "classifier" / "classes.json", CLASSES)

    arrays = {"image": known.images, "label": np.array(labels, np.int32)}
    return Recipe(net.init, make_classifier_loss(net, augment, **loss), arrays, evaluate, export)


def with_heads(params: Params, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> Params:
    """The trunk with LPIPS heads that weigh all channels of a stage equally, by 1 / channels.

    Training the heads would need human judgements of emoji, which do not exist; with equal weights, a stage's term is
    the mean squared difference of its unit features.
    """
    heads = {name: np.full(s.shape, 1 / s.shape[2], np.float32) for name, s in shapes.items() if name.startswith("lin")}
    return {name: params[name] for name in shapes if name not in heads} | heads
