"""The embedded text encoder and UNet, trained together as Stable Diffusion was, in the latents of an autoencoder."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from instaflow_jax import pipeline, sampling, teacher
from instaflow_jax.arrays import Params
from instaflow_jax.data.openmoji.captions import Emoji, level_probabilities
from instaflow_jax.data.openmoji.dataset import caption_ids
from instaflow_jax.infra import images
from instaflow_jax.infra.runner import BatchedRunner
from instaflow_jax.models.clip import CLIPTextModel
from instaflow_jax.models.net import Net
from instaflow_jax.models.unet import UNet2DConditionModel
from instaflow_jax.models.vae import AutoencoderKL
from instaflow_jax.stages.common.fit import EvalOptions, Evaluate
from instaflow_jax.stages.common.loading import check_drawn, check_files, check_finite, name_image
from instaflow_jax.stages.pretrain.losses import Augment, join, make_diffusion_loss, part
from instaflow_jax.stages.pretrain.recipe import LoadSplit, Recipe, embedded_tokenizer

INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.39.0",
    "vae": ["diffusers", "AutoencoderKL"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "safety_checker": [None, None],
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
}
_TRAINED = ("unet", "text_encoder")


def make(
    load: LoadSplit,
    augment: Augment,
    *,
    autoencoder: str,
    unet: Mapping[str, Any],
    text_encoder: Mapping[str, Any],
    scheduler: dict[str, Any],
    empty: float,
    copies: int,
    toned_copies: int,
    loss: Mapping[str, float],
    seed: int,
    evaluation: EvalOptions,
) -> Recipe:
    """Trains on all emoji: the latents of each one, unchanged and slightly moved, with its captions at every level.

    Args:
      autoencoder: embedded name, or directory with vae/.
      unet, text_encoder, scheduler: contents of their `config.json` files.
      empty: share of empty captions.
      copies, toned_copies: see `repeat_emoji`.
      loss: keywords of `make_diffusion_loss`.
      seed: seed of the augmentation.
    """
    check_files(autoencoder)
    vae, vae_params = AutoencoderKL.from_pretrained(pipeline.locate(autoencoder), "vae")
    check_finite(f"{autoencoder}/vae", vae_params)
    trained = {"unet": UNet2DConditionModel.from_config(unet), "text_encoder": CLIPTextModel.from_config(text_encoder)}
    nets, tokenizer, schedule = {**trained, "vae": vae}, embedded_tokenizer(), teacher.read_schedule(scheduler)
    data = load("all")
    row, moved = repeat_emoji(data.emoji, copies, toned_copies)

    def init(key):
        keys = jax.random.split(key)
        return join({name: trained[name].init(keys[i]) for i, name in enumerate(_TRAINED)})

    def all_params(params: Params) -> dict[str, Params]:
        return {name: part(params, name) for name in _TRAINED} | {"vae": vae_params}

    def export(params: Params, directory: Path) -> None:
        pipe = pipeline.Pipeline(nets, all_params(params), tokenizer, scheduler, INDEX)
        pipeline.save(pipe, directory, dtype=np.float16)

    probabilities = tuple(level_probabilities(empty))
    arrays = {
        "latent": make_latents(vae, vae_params, augment, data.images[row], moved, seed),
        "ids": caption_ids(tokenizer, data.emoji)[row],
    }
    return Recipe(
        init,
        make_diffusion_loss(*trained.values(), schedule, level_probabilities=probabilities, **loss),
        arrays,
        make_evaluate(evaluation, nets, all_params, schedule, tokenizer),
        export,
    )


def repeat_emoji(emoji: list[Emoji], plain: int, toned: int) -> tuple[Int[np.ndarray, " N"], Bool[np.ndarray, " N"]]:
    """How often an epoch shows each emoji: `plain` times, and `toned` times if its name has a skin tone.

    Half of all emoji are skin tones of others; without this, most steps would be spent on them.

    Returns:
      Row numbers of `emoji`, and for each whether to augment it (all copies but the first).
    """
    counts = np.array([toned if e.skin_tone else plain for e in emoji])
    copy = np.concatenate([np.arange(count) for count in counts])
    return np.repeat(np.arange(len(emoji)), counts), copy > 0


def make_latents(
    vae: Net,
    params: Params,
    augment: Augment,
    originals: UInt8[np.ndarray, "N H W 3"],
    moved: Bool[np.ndarray, " N"],
    seed: int,
) -> Float[np.ndarray, "N h w c"]:
    """Latents of the images, augmented where `moved`; each group of 64 images has its own key, from `seed` on."""

    def encode(params, rows, moved, key_data):
        pixels = images.to_pixels(rows)
        shifted = augment(jax.random.wrap_key_data(key_data[0]), pixels)
        return vae.apply(params, jnp.where(moved[:, None, None, None], shifted, pixels), method="encode")

    group = 64  # images of a device and call, so that a device has one key
    keys = [jax.random.key_data(jax.random.key(seed + i)) for i in range(-(-len(moved) // group))]
    return BatchedRunner(encode, group)(params, originals, moved, np.repeat(np.stack(keys), group, 0)[: len(moved)])


def make_evaluate(
    options: EvalOptions,
    nets: Mapping[str, Net],
    all_params: Callable[[Params], Mapping[str, Params]],
    schedule: teacher.Schedule,
    tokenizer,
) -> Evaluate:
    """A grid of teacher samples, one row per prompt, always from the same noise."""
    solve = sampling.make_solve(nets["unet"].apply, schedule, "dpm_solver", options.N, options.alpha)
    generate = jax.jit(sampling.make_generate(nets, solve))
    prompts, seeds, config = list(options.prompts), options.seeds, nets["unet"].config
    ids, null_ids = np.repeat(tokenizer(prompts), seeds, 0), tokenizer([""])
    shape = (config.sample_size, config.sample_size, config.in_channels)

    def evaluate(params: Params, path: Path) -> dict[str, float]:
        X0 = sampling.noise(np.tile(np.arange(seeds), len(prompts)), shape)
        drawn, finite = map(np.asarray, generate(all_params(params), ids, null_ids, X0))
        check_drawn(finite, [name_image(prompt, seed) for prompt in prompts for seed in range(seeds)])
        grid = images.grid(drawn, columns=seeds, row_labels=prompts, column_labels=(), scale=2)
        images.save_png(path, grid, {"prompts": "|".join(prompts), "alpha": str(options.alpha)})
        return {"spread": float(drawn.reshape(len(prompts), seeds, -1).std(1).mean() / 255)}

    return evaluate
