"""The embedded text encoder and UNet, trained together as Stable Diffusion was, in the latents of an autoencoder."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from instaflow_jax import pipeline, sampling, teacher
from instaflow_jax.data.openmoji.captions import Emoji, level_probabilities
from instaflow_jax.infra import images
from instaflow_jax.models.clip import CLIPTextModel
from instaflow_jax.models.net import Net
from instaflow_jax.models.unet import UNet2DConditionModel
from instaflow_jax.models.vae import AutoencoderKL
from instaflow_jax.stages.pretrain import losses as pretraining
from instaflow_jax.stages.pretrain.recipe import Recipe, caption_tokens, in_batches, load, make_augment, to_pixels
from instaflow_jax.stages.pretrain.recipe import tokenizer as embedded_tokenizer

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


def make(config: ConfigDict, workdir: str) -> Recipe:
    """Trained on all emoji: the latents of each, as it is and moved a little, and its captions at every level."""
    vae, vae_params = AutoencoderKL.from_pretrained(pipeline.locate(config.autoencoder), "vae")
    nets = {
        "unet": UNet2DConditionModel.from_config(config.unet.to_dict()),
        "text_encoder": CLIPTextModel.from_config(config.text_encoder.to_dict()),
        "vae": vae,
    }
    scheduler, tokenizer = config.scheduler.to_dict(), embedded_tokenizer()
    schedule = teacher.read_schedule(scheduler)
    data = load(config, workdir, "all")
    row, moved = copies(data.emoji, config.copies, config.toned_copies)

    def init(key):
        keys = jax.random.split(key)
        return pretraining.joined(
            {"unet": nets["unet"].init(keys[0]), "text_encoder": nets["text_encoder"].init(keys[1])}
        )

    def whole(params) -> dict:
        return {name: pretraining.part(params, name) for name in ("unet", "text_encoder")} | {"vae": vae_params}

    def export(params, directory: Path) -> None:
        pipe = pipeline.Pipeline(nets, whole(params), tokenizer, scheduler, INDEX)
        pipeline.save(pipe, directory, dtype=np.float16)

    loss = pretraining.make_diffusion_loss(
        nets["unet"],
        nets["text_encoder"],
        schedule,
        level_probabilities=tuple(level_probabilities(config.empty)),
        **config.loss,
    )
    arrays = {
        "latent": latents(config, vae, vae_params, data.images, row, moved),
        "tokens": caption_tokens(data.emoji)[row],
    }
    return Recipe(init, loss, arrays, make_watch(config, nets, whole, schedule, tokenizer), export)


def copies(emoji: list[Emoji], plain: int, toned: int) -> tuple[np.ndarray, np.ndarray]:
    """How often an epoch shows each emoji: `plain` times, those with a skin tone in their name `toned` times.

    Half of all emoji are skin tones of others; a fair draw would spend most steps on them.

    Returns:
      Row numbers of `emoji`, and for each whether it is a copy that is to be moved: all but the first.
    """
    counts = np.array([toned if e.skin_tone else plain for e in emoji])
    number = np.concatenate([np.arange(count) for count in counts])
    return np.repeat(np.arange(len(emoji)), counts), number > 0


def latents(config: ConfigDict, vae: Net, params, pictures, row, moved) -> np.ndarray:
    """Latents [len(row), h, w, c] of the pictures `row`, augmented where `moved`."""
    augment = make_augment(config)

    @jax.jit
    def encode(pixels, moved, key_data):
        shifted = augment(jax.random.wrap_key_data(key_data[0]), pixels)
        return vae.apply(params, jnp.where(moved[:, None, None, None], shifted, pixels), method="encode")

    batch = 64
    seeds = np.arange(len(row)) // batch + config.seed
    keys = np.stack([jax.random.key_data(jax.random.key(s)) for s in range(seeds[0], seeds[-1] + 1)])[seeds - seeds[0]]
    return in_batches(lambda *rows: encode(to_pixels(pictures[rows[0]]), *rows[1:]), batch, row, moved, keys)


def make_watch(config: ConfigDict, nets: dict[str, Net], whole, schedule: teacher.Schedule, tokenizer):
    """A grid of teacher samples, a row a prompt, always from the same noise."""
    solve = sampling.make_solve(nets["unet"].apply, schedule, "dpm_solver", config.eval.N, config.eval.alpha)
    generate = jax.jit(sampling.make_generate(nets, solve))
    prompts, seeds = list(config.eval.prompts), config.eval.seeds
    ids, null = np.repeat(tokenizer(prompts), seeds, 0), tokenizer([""])
    shape = (nets["unet"].config.sample_size,) * 2 + (nets["unet"].config.in_channels,)

    def watch(params, path: Path) -> dict[str, float]:
        X0 = sampling.noise(np.tile(np.arange(seeds), len(prompts)), shape)
        pictures = np.asarray(generate(whole(params), ids, null, X0))
        grid = images.grid(pictures, columns=seeds, row_labels=prompts, column_labels=(), scale=2)
        images.save_png(path, grid, {"prompts": "|".join(prompts), "alpha": str(config.eval.alpha)})
        return {"spread": float(pictures.reshape(len(prompts), seeds, -1).std(1).mean() / 255)}

    return watch
