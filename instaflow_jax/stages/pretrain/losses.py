"""The four losses of the embedded world: autoencoder, diffusion, CLIP, classifier.

Each `make_*_loss` binds networks and settings and returns a loss `(params, frozen, batch, key) → (scalar, metrics)`
for `step.make_train_step`. Images arrive as uint8 and are converted and augmented on the device.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from instaflow_jax import teacher
from instaflow_jax.arrays import AnyArray, Image, Key, Params, Scalar
from instaflow_jax.infra.images import to_pixels
from instaflow_jax.train.step import Loss

Augment = Callable[[Key, Image], Image]


# ---------------------------------------------------------------- autoencoder


def make_autoencoder_loss(vae, augment: Augment, *, kl_weight: float, l1_weight: float) -> Loss:
    """Squared error of the reconstruction + `l1_weight` · absolute error + `kl_weight` · KL to N(0, I), all means.

    The batch has `image`, uint8 [B, H, W, 3].

    Args:
      vae: an `AutoencoderKL` network.
    """

    def loss(params, frozen, batch, key):
        augment_key, draw_key = jax.random.split(key)
        pixels = augment(augment_key, to_pixels(batch["image"]))
        mean, logvar = vae.apply(params, pixels, method="moments")
        z = mean + jnp.exp(logvar / 2) * jax.random.normal(draw_key, mean.shape)
        error = vae.apply(params, z * vae.config.scaling_factor, method="decode") - pixels
        mse = jnp.mean(error**2)
        kl = jnp.mean(mean**2 + jnp.exp(logvar) - 1 - logvar) / 2
        total = mse + l1_weight * jnp.mean(jnp.abs(error)) + kl_weight * kl
        return total, {"psnr": psnr(mse), "kl": kl, "latent_std": jnp.std(mean)}

    return loss


def psnr(mse: Scalar) -> Scalar:
    """Peak signal-to-noise ratio in dB of pixels in [-1, 1], whose peak is 2."""
    return 10 * jnp.log10(4 / mse)


# ---------------------------------------------------------------- diffusion


def make_diffusion_loss(
    unet, text_encoder, schedule: teacher.Schedule, *, level_probabilities: tuple[float, ...], min_snr: float
) -> Loss:
    """Stable Diffusion's loss, ‖out − target‖² at one random tau per sample; trains text encoder and UNet together.

    The batch has `latent`, float [B, h, w, c], and `ids`, int [B, K, L]: the caption at each of K levels, of which one
    is drawn. Captions are drawn here and not in the data, so that every epoch sees different ones.

    Args:
      unet, text_encoder: networks; `params` holds both, named as by `join`.
      level_probabilities: probability of each of the K caption levels; the last level is the empty caption.
      min_snr: gamma of min-SNR weighting (arXiv 2303.09556), min(snr, gamma) / snr for a noise predictor; without it,
        fine detail of almost clean latents dominates the gradient. `inf` turns it off.
    """
    weight = jnp.asarray(min_snr_weight(schedule, min_snr), jnp.float32)
    log_p = jnp.log(jnp.asarray(level_probabilities))

    def loss(params, frozen, batch, key):
        level_key, tau_key, eps_key = jax.random.split(key, 3)
        X1 = batch["latent"]
        ids = draw_captions(level_key, batch["ids"], log_p)
        text = text_encoder.apply(part(params, "text_encoder"), ids).last_hidden_state
        tau = stratified(tau_key, len(X1), len(schedule.abar))
        eps = jax.random.normal(eps_key, X1.shape)
        out = unet.apply(part(params, "unet"), teacher.add_noise(schedule, X1, eps, tau), tau, text)
        error = jnp.mean((out - teacher.training_target(schedule, X1, eps, tau)) ** 2, axis=(1, 2, 3))
        return jnp.mean(weight[tau] * error), {"mse": jnp.mean(error)}

    return loss


def draw_captions(key: Key, ids: Int[Array, "B K L"], log_p: Float[Array, " K"]) -> Int[Array, "B L"]:
    """One random caption level for each sample, with probability exp(log_p)."""
    level = jax.random.categorical(key, log_p, shape=(len(ids),))
    return ids[jnp.arange(len(ids)), level]


def stratified(key: Key, count: int, num_timesteps: int) -> Int[Array, " B"]:
    """`count` random timesteps in 0 .. num_timesteps-1, uniform, but one from each of `count` equal slices."""
    slices = (jnp.arange(count) + jax.random.uniform(key, (count,))) / count
    return jnp.minimum((num_timesteps * slices).astype(jnp.int32), num_timesteps - 1)


def min_snr_weight(schedule: teacher.Schedule, gamma: float) -> Float[np.ndarray, " T"]:
    """Weight of each timestep; see `make_diffusion_loss`."""
    snr = schedule.abar / (1 - schedule.abar)
    return np.minimum(snr, gamma) / snr


def join(parts: Mapping[str, Params]) -> dict[str, AnyArray]:
    """The parameters of several networks as one flat dict, prefixed with the network: `unet.conv_in.kernel`."""
    return {f"{name}.{key}": value for name, params in parts.items() for key, value in params.items()}


def part(params: Params, name: str) -> dict[str, AnyArray]:
    """The parameters of one network out of `join`."""
    prefix = f"{name}."
    return {key.removeprefix(prefix): value for key, value in params.items() if key.startswith(prefix)}


# ---------------------------------------------------------------- CLIP and classifier


def make_clip_loss(clip, augment: Augment, *, level_probabilities: tuple[float, ...]) -> Loss:
    """CLIP's symmetric contrastive loss; all pairs in a batch with equal captions count as right.

    The batch has `image`, uint8 [B, H, W, 3], and `ids`, int [B, K, L], of which one level is drawn. Eighteen
    astronauts may share the caption "astronaut": the target spreads evenly over all of them, because equal texts cannot
    be told apart.
    """
    log_p = jnp.log(jnp.asarray(level_probabilities))

    def loss(params, frozen, batch, key):
        level_key, augment_key = jax.random.split(key)
        ids = draw_captions(level_key, batch["ids"], log_p)
        logits = clip.apply(params, ids, augment(augment_key, to_pixels(batch["image"]))).logits_per_image
        same = jnp.all(ids[:, None] == ids[None], axis=-1).astype(jnp.float32)
        target = same / same.sum(1, keepdims=True)
        value = (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
        right = jnp.take_along_axis(same, jnp.argmax(logits, 1)[:, None], 1).mean()
        return value, {"accuracy": right}

    return loss


def make_classifier_loss(classifier, augment: Augment, *, smoothing: float) -> Loss:
    """Cross-entropy with label smoothing, from `image`, uint8 [B, H, W, 3], to `label`, int [B]."""

    def loss(params, frozen, batch, key):
        logits = classifier.apply(params, augment(key, to_pixels(batch["image"])))
        target = jax.nn.one_hot(batch["label"], logits.shape[1])
        target = (1 - smoothing) * target + smoothing / logits.shape[1]
        return cross_entropy(logits, target), {"accuracy": jnp.mean(jnp.argmax(logits, 1) == batch["label"])}

    return loss


def cross_entropy(logits: Float[AnyArray, "B K"], target: Float[AnyArray, "B K"]) -> Scalar:
    """Mean over rows of −Σ target · log softmax(logits)."""
    return -jnp.mean(jnp.sum(target * jax.nn.log_softmax(logits), axis=1))
