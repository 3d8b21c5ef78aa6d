"""Stage `pretrain`: trains one network of the embedded world from nothing and writes it in diffusers layout.

The recipes (`pretrain_autoencoder`, `_diffusion`, `_clip`, `_classifier`) differ in network, loss and data; the loop,
checkpoints and metrics are those of every other training.
"""

import importlib
from pathlib import Path

import jax
from ml_collections import ConfigDict

from instaflow_jax.infra import devices
from instaflow_jax.stages.common import fit as training
from instaflow_jax.stages.pretrain.recipe import Recipe
from instaflow_jax.train.batches import ArrayBatches

RECIPES = ("autoencoder", "diffusion", "clip", "classifier")


def run(config: ConfigDict, workdir: str) -> None:
    """Trains `config.recipe` in `workdir`/RECIPE, resuming if it was broken off, and exports to `workdir`/export.

    Raises:
      ValueError, FileNotFoundError: a field of the config, or a file of a network it stands on, is wrong.
    """
    check(config)
    recipe: Recipe = importlib.import_module(f"instaflow_jax.stages.pretrain.{config.recipe}").make(config, workdir)
    directory = Path(workdir) / config.recipe
    export = Path(workdir) / "export"

    def watch(ema, path):
        recipe.export(ema, export)  # so that a run that is stopped leaves something to use
        return recipe.watch(ema, path)

    state = training.train(
        config,
        directory,
        start=recipe.init,
        loss=recipe.loss,
        frozen={},
        watch=watch,
        batches=ArrayBatches(recipe.arrays, batch_size=config.batch_size, seed=config.seed),
    )
    ema = devices.to_host(state.ema)  # every process gathers, the first writes
    if jax.process_index() == 0:
        recipe.export(ema, export)
        print(f"exported the running mean of step {int(state.step)} to {export}", flush=True)
    devices.barrier("export")


def check(config: ConfigDict) -> None:
    """Cross-field checks, before any data is drawn.

    Raises:
      ValueError: naming field, value and remedy.
    """
    if config.recipe not in RECIPES:
        raise ValueError(f"config.recipe={config.recipe!r} is not one of {', '.join(RECIPES)}")
    if config.eval_every < 1:
        raise ValueError(f"config.eval_every={config.eval_every} must be 1 or more steps")
