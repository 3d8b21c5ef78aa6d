"""The embedded LPIPS: a small VGG taught to tell the subgroups of emoji apart; its features judge distances."""

import json
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from instaflow_jax.arrays import Params
from instaflow_jax.data.openmoji.groups import SUBGROUPS
from instaflow_jax.infra import files, images
from instaflow_jax.models.lpips import LPIPS, VGGClassifier
from instaflow_jax.stages.pretrain import losses as pretraining
from instaflow_jax.stages.pretrain.recipe import Recipe, in_batches, load, make_augment, to_pixels

CLASSES = tuple(sorted(SUBGROUPS))


def make(config: ConfigDict, workdir: str) -> Recipe:
    """Trained on the split "train"; watched on "heldout", whose emoji it has never seen in any tone or gender."""
    net = VGGClassifier.from_config(config.model.to_dict() | {"num_classes": len(CLASSES)})
    known, held_out = (load(config, workdir, split) for split in ("train", "heldout"))
    labels, truth = ([CLASSES.index(e.subgroup) for e in data.emoji] for data in (known, held_out))
    classify = jax.jit(net.apply)

    def watch(params, path: Path) -> dict[str, float]:
        guess = in_batches(lambda x: classify(params, x), 62, to_pixels(held_out.images)).argmax(1)
        shown = held_out.images[np.argsort(guess, kind="stable")]
        images.save_png(
            path,
            images.grid(shown, columns=20, row_labels=(), column_labels=(), scale=1),
            {"shows": "held-out emoji in the order of the subgroup they were taken for"},
        )
        return {"heldout_accuracy": float(np.mean(guess == truth))}

    def export(params, directory: Path) -> None:
        lpips = LPIPS.from_config(config.model.to_dict())
        lpips.save_pretrained(with_heads(params, lpips.shapes), directory / "lpips", dtype=np.float16)
        net.save_pretrained(params, directory / "classifier", dtype=np.float16)
        with files.atomic_write(directory / "classifier" / "classes.json") as temporary:
            temporary.write_text(json.dumps(CLASSES, indent=1) + "\n")

    loss = pretraining.make_classifier_loss(net, make_augment(config), **config.loss)
    return Recipe(net.init, loss, {"image": known.images, "label": np.array(labels, np.int32)}, watch, export)


def with_heads(params: Params, shapes) -> Params:
    """The trunk with LPIPS heads that weigh all channels of a stage alike, 1 / channels.

    Fitting heads needs people's judgements of emoji, which do not exist; equal non-negative weights make a stage's
    term the mean squared difference of unit features.
    """
    heads = {name: np.full(s.shape, 1 / s.shape[2], np.float32) for name, s in shapes.items() if name.startswith("lin")}
    return {name: params[name] for name in shapes if name not in heads} | heads
