"""Stage `pretrain`: trains one network of the embedded world from scratch and writes it in diffusers layout.

The recipes differ in network, loss and data; they share the training loop with reflow and distillation.
"""

import functools
from pathlib import Path

from ml_collections import ConfigDict

from instaflow_jax import pipeline
from instaflow_jax.arrays import Params
from instaflow_jax.data.openmoji import dataset as openmoji
from instaflow_jax.data.openmoji.augment import augment
from instaflow_jax.infra import devices, files
from instaflow_jax.models.vae import AutoencoderKL
from instaflow_jax.stages.common import fit
from instaflow_jax.stages.pretrain import autoencoder, classifier, clip, diffusion
from instaflow_jax.stages.pretrain.recipe import Recipe
from instaflow_jax.train.batches import ArrayBatches

RECIPES = {  # each recipe's `make`, and the fields of the config that it takes
    "autoencoder": (autoencoder.make, ("model", "loss")),
    "diffusion": (
        diffusion.make,
        ("autoencoder", "unet", "text_encoder", "scheduler", "empty", "copies", "toned_copies", "loss", "seed"),
    ),
    "clip": (clip.make, ("model", "empty")),
    "classifier": (classifier.make, ("model", "loss")),
}


def run(config: ConfigDict, workdir: str) -> None:
    """Trains `config.recipe` in `workdir`/RECIPE, resuming if it was interrupted, and exports to `workdir`/export.

    Raises:
      ValueError, FileNotFoundError: a field of the config, or a file of a network that the recipe needs, is wrong.
    """
    options = check(config, workdir)
    recipe, export = read_recipe(config, workdir), Path(workdir) / "export"

    def write(ema: Params) -> None:
        with files.renew_checksums(export):
            recipe.export(ema, export)

    def evaluate(ema: Params, path: Path) -> dict[str, float]:
        write(ema)  # so that an interrupted run leaves a usable network
        return recipe.evaluate(ema, path)

    state = fit.train(
        options,
        Path(workdir) / config.recipe,
        init=recipe.init,
        loss=recipe.loss,
        frozen={},
        batches=ArrayBatches(recipe.arrays, batch_size=options.batch_size, seed=options.seed),
        evaluate=evaluate,
        cast=devices.keep,
    )
    fit.export_ema(state, write)
    print(f"exported the running mean of step {int(state.step)} to {export}", flush=True)


def check(config: ConfigDict, workdir: str) -> fit.TrainOptions:
    """Every check of `run` that needs no images, which take minutes to draw. Raises as `run` does."""
    if config.recipe not in RECIPES:
        raise ValueError(f"config.recipe={config.recipe!r} is not one of {', '.join(RECIPES)}")
    options = fit.read_train_options(config)
    fit.check_same_run(options, Path(workdir) / config.recipe)
    fit.check(options)
    if "autoencoder" in config:
        AutoencoderKL.from_pretrained(pipeline.locate(config.autoencoder), "vae")
    return options


def read_recipe(config: ConfigDict, workdir: str) -> Recipe:
    """The recipe `config.recipe` with its data loaded; missing images are first drawn into `config.data_dir`."""
    make, fields = RECIPES[config.recipe]
    values = config.to_dict()
    load = functools.partial(openmoji.load, config.data_dir or Path(workdir) / "data", config.size)
    keywords = {name: values[name] for name in fields}
    if "eval" in config:
        keywords["evaluation"] = fit.read_eval_options(config.eval)
    return make(load, functools.partial(augment, **values["augment"]), **keywords)
