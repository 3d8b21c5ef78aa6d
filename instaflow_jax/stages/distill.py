"""Stage `distill`: a straightened flow → a one-step generator (paper, Eq. 6), by L2, LPIPS, or one after the other."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from instaflow_jax import pipeline
from instaflow_jax.arrays import Params
from instaflow_jax.models.lpips import LPIPS
from instaflow_jax.stages import reflow
from instaflow_jax.stages.common import flow_training, loading
from instaflow_jax.stages.generate.stage import need_pairs
from instaflow_jax.train import losses
from instaflow_jax.weights.conventions import NUM_TIMESTEPS

DISTANCES = ("l2", "lpips")


def run(config: ConfigDict, workdir: str) -> None:
    """Trains in `workdir`/`config.output` on the pairs that the flow `config.model` made.

    First makes what is missing: the flow (if `config.model` is ""), by `reflow` with `config.reflow`, and the pairs, in
    `workdir`/`config.pairs_folder`.

    Raises:
      ValueError, FileNotFoundError: a field of the config, the flow or the pairs are wrong.
      OSError, FloatingPointError: see `train.loop`.
    """
    options = flow_training.read_flow_options(config)
    if config.distance not in DISTANCES:
        raise ValueError(f"config.distance={config.distance!r} is not one of {', '.join(DISTANCES)}")
    source = config.model or need_reflow(config.reflow, workdir)
    with config.pairs.unlocked():
        config.pairs.model = source
    pairs = need_pairs(config.pairs, Path(workdir) / config.pairs_folder)
    pipe = loading.load(config.init_from or source, options.weights)
    distance, frozen = losses.latent_distance, {}
    if config.distance == "lpips":
        distance, frozen = make_lpips_distance(pipe, options.weights.dtype, options.remat, **config.lpips)
    loss = losses.make_distill_loss(
        pipe.nets["unet"].with_remat(options.remat["unet"]),
        pipe.nets["text_encoder"],
        distance,
        match=config.match,
        prompt_dropout=options.prompt_dropout,
        num_timesteps=NUM_TIMESTEPS,
    )
    flow_training.train_flow(options, Path(workdir) / config.output, pipe, pairs, loss, frozen)


def need_reflow(config: ConfigDict, workdir: str) -> str:
    """The directory of the flow that `reflow` writes into this workdir; trains it with `config` if it is missing."""
    source = Path(workdir) / reflow.DIRECTORY / loading.EXPORT
    if not (source / "model_index.json").is_file():
        print(f"{source} is missing\n→ running reflow first", flush=True)
        reflow.run(config, workdir)
    return str(source)


def make_lpips_distance(
    pipe: pipeline.Pipeline,
    dtype: str,
    remat: Mapping[str, str],
    *,
    model: str,
    trunk: str,
    heads: str,
    net: str,
    **options: Any,
) -> tuple[Callable, dict[str, Params]]:
    """The distance `losses.make_lpips_distance(..., **options)` and its frozen weights.

    Args:
      dtype: compute type of the trunk; its features are compared in float32.
      remat: choices for the decoder ("vae") and for "lpips".
      model: embedded name or directory with lpips/, used if `trunk` is "".
      trunk, heads, net: torchvision's and the lpips package's weight files, and the network they belong to.
    """
    if trunk:
        lpips, params = LPIPS.from_files(trunk, heads, net=net, dtype=loading.DTYPES[dtype])
    else:
        lpips, params = LPIPS.from_pretrained(pipeline.locate(model), "lpips", dtype=loading.DTYPES[dtype])
    vae, lpips = pipe.nets["vae"].with_remat(remat["vae"]), lpips.with_remat(remat["lpips"])
    return losses.make_lpips_distance(vae, lpips, **options), {"vae": pipe.params["vae"], "lpips": params}
