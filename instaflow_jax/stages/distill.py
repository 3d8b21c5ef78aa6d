"""Stage `distill`: a straightened flow → a one-step generator (paper, Eq. 6), by L2, LPIPS, or one after the other."""

from pathlib import Path

from ml_collections import ConfigDict

from instaflow_jax import pipeline
from instaflow_jax.models.lpips import LPIPS
from instaflow_jax.stages import reflow
from instaflow_jax.stages.common import flow_training as straighten
from instaflow_jax.stages.common import loading
from instaflow_jax.train import losses

DISTANCES = ("l2", "lpips")


def run(config: ConfigDict, workdir: str) -> None:
    """Trains in `workdir`/`config.output` on the pairs in `workdir`/`config.pairs_folder`, made by the flow `config.model`.

    What is not there is made first: the flow (where `config.model` is "") by `reflow` with `config.reflow`, and the pairs.

    Raises:
      ValueError, FileNotFoundError: a field of the config, the flow or the pairs are wrong.
      OSError, FloatingPointError: see `train.loop`.
    """
    straighten.check(config)
    if config.distance not in DISTANCES:
        raise ValueError(f"config.distance={config.distance!r} is not one of {', '.join(DISTANCES)}")
    source = config.model or need_reflow(config, workdir)
    with config.pairs.unlocked():
        config.pairs.model = source
    pairs = straighten.need_pairs(config.pairs, Path(workdir) / config.pairs_folder)
    pipe = loading.load(config.init_from or source, loading.read_weight_options(config))
    distance, frozen = make_distance(config, pipe)
    unet = pipe.nets["unet"].with_remat(config.remat.unet)
    loss = losses.make_distill_loss(
        unet,
        pipe.nets["text_encoder"],
        distance,
        match=config.match,
        prompt_dropout=config.prompt_dropout,
        num_timesteps=straighten.NUM_TIMESTEPS,
    )
    straighten.fit(config, Path(workdir) / config.output, pipe, pairs, loss, frozen)


def need_reflow(config: ConfigDict, workdir: str) -> str:
    """The directory of the flow that `reflow` wrote into this workdir; it is trained first if it is not there."""
    source = Path(workdir) / reflow.DIRECTORY / straighten.EXPORT
    if not (source / "model_index.json").is_file():
        print(f"{source} is not there\n→ reflow first", flush=True)
        reflow.run(config.reflow, workdir)
    return str(source)


def make_distance(config: ConfigDict, pipe: pipeline.Pipeline):
    """The distance of Eq. 6 and the frozen weights that it looks through."""
    if config.distance == "l2":
        return losses.latent_distance, {}
    dtype = loading.DTYPES[config.dtype]  # of the trunk's products; its features are compared in float32
    if config.lpips.trunk:
        lpips, params = LPIPS.from_files(config.lpips.trunk, config.lpips.heads, net=config.lpips.net, dtype=dtype)
    else:
        lpips, params = LPIPS.from_pretrained(pipeline.locate(config.lpips.model), "lpips", dtype=dtype)
    options = {name: config.lpips[name] for name in ("l2", "crop", "margin")}
    vae, lpips = pipe.nets["vae"].with_remat(config.remat.vae), lpips.with_remat(config.remat.lpips)
    return losses.make_lpips_distance(vae, lpips, **options), {"vae": pipe.params["vae"], "lpips": params}
