"""The four losses of the embedded world: autoencoder, diffusion, CLIP, classifier.

Each `make_*_loss` binds networks and settings and returns a loss `(params, frozen, batch, key) -> (scalar, metrics)`
for `step.make_train_step`. Pictures come as uint8 and are turned, moved and scaled on the device by `augment`.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from instaflow_jax import teacher
from instaflow_jax.arrays import Image, Key, Scalar
from instaflow_jax.train.step import Loss

Augment = Callable[[Key, Image], Image]


def to_pixels(image: UInt8[Array, "B H W 3"]) -> Image:
    """Bytes to the range [-1, 1] of the networks."""
    return image.astype(jnp.float32) / 127.5 - 1


def psnr(mse: Scalar) -> Scalar:
    """Peak signal-to-noise ratio in dB of pixels in [-1, 1], whose peak is 2."""
    return 10 * jnp.log10(4 / mse)


def make_autoencoder_loss(vae, augment: Augment, *, kl_weight: float, l1_weight: float) -> Loss:
    """Squared error of the reconstruction + `l1_weight` absolute error + `kl_weight` KL to N(0, I) per latent value.

    Args:
      vae: an `AutoencoderKL` network; the batch has `image`, uint8 [B, H, W, 3].
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


def make_diffusion_loss(
    unet, text_encoder, schedule: teacher.Schedule, *, level_probabilities: tuple[float, ...], min_snr: float
) -> Loss:
    """What Stable Diffusion was trained with, || out - target ||^2 at one random tau a sample, text encoder and UNet
    together.

    The batch has `latent`, float [B, h, w, c], and `tokens`, int [B, K, L]: the caption at each of K levels, of which
    one is drawn. Captions are drawn here and not in the data, so that each epoch sees other ones.

    Args:
      unet, text_encoder: networks whose parameters are together in `params`, as `joined` names them.
      level_probabilities: of the K caption levels; the last level's is that of the empty caption.
      min_snr: gamma of min-SNR weighting (arXiv 2303.09556), min(snr, gamma) / snr for a noise predictor: without it
        the fine detail of almost clean latents takes most of the gradient; `inf` for none.
    """
    weight = jnp.asarray(_min_snr_weight(schedule, min_snr), jnp.float32)
    log_p = jnp.log(jnp.asarray(level_probabilities))

    def loss(params, frozen, batch, key):
        level_key, tau_key, eps_key = jax.random.split(key, 3)
        X1, tokens = batch["latent"], batch["tokens"]
        level = jax.random.categorical(level_key, log_p, shape=(len(X1),))
        text = text_encoder.apply(part(params, "text_encoder"), tokens[jnp.arange(len(X1)), level]).last_hidden_state
        tau = stratified(tau_key, len(X1), len(schedule.abar))
        eps = jax.random.normal(eps_key, X1.shape)
        out = unet.apply(part(params, "unet"), teacher.add_noise(schedule, X1, eps, tau), tau, text)
        error = jnp.mean((out - teacher.training_target(schedule, X1, eps, tau)) ** 2, axis=(1, 2, 3))
        return jnp.mean(weight[tau] * error), {"mse": jnp.mean(error)}

    return loss


def stratified(key: Key, count: int, steps: int) -> Array:
    """`count` integer times in 0 .. steps-1, one from each of `count` equal slices: uniform, and no batch is lopsided."""
    slices = (jnp.arange(count) + jax.random.uniform(key, (count,))) / count
    return jnp.minimum((steps * slices).astype(jnp.int32), steps - 1)


def _min_snr_weight(schedule: teacher.Schedule, gamma: float) -> np.ndarray:
    snr = schedule.abar / (1 - schedule.abar)
    return np.minimum(snr, gamma) / snr


def joined(parts: Mapping[str, Mapping[str, Array]]) -> dict[str, Array]:
    """Several networks' parameters as one flat dict, each name behind its network's: `unet.conv_in.kernel`."""
    return {f"{name}.{key}": value for name, params in parts.items() for key, value in params.items()}


def part(params: Mapping[str, Array], name: str) -> dict[str, Array]:
    """One network's parameters out of `joined`."""
    start = f"{name}."
    return {key.removeprefix(start): value for key, value in params.items() if key.startswith(start)}


def make_clip_loss(clip, augment: Augment, preprocess: Callable[[Image], Image], *, level_probabilities) -> Loss:
    """CLIP's symmetric contrastive loss, with every pair of equal captions in a batch counted as right.

    The batch has `image`, uint8, and `tokens`, int [B, K, L], of which one level is drawn. Eighteen astronauts may
    share the caption "astronaut": a target then spreads evenly over all of them, or the loss would ask to tell equal
    texts apart.

    Args:
      preprocess: pixels in [-1, 1] to what the network was made for.
    """
    log_p = jnp.log(jnp.asarray(level_probabilities))

    def loss(params, frozen, batch, key):
        level_key, augment_key = jax.random.split(key)
        count = len(batch["image"])
        level = jax.random.categorical(level_key, log_p, shape=(count,))
        tokens = batch["tokens"][jnp.arange(count), level]
        pixels = preprocess(augment(augment_key, to_pixels(batch["image"])))
        logits = clip.apply(params, tokens, pixels).logits_per_image
        same = jnp.all(tokens[:, None] == tokens[None], axis=-1).astype(jnp.float32)
        target = same / same.sum(1, keepdims=True)
        value = (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
        right = jnp.take_along_axis(same, jnp.argmax(logits, 1)[:, None], 1).mean()
        return value, {"accuracy": right}

    return loss


def cross_entropy(logits: Float[Array, "B K"], target: Float[Array, "B K"]) -> Scalar:
    """Mean over rows of -sum target log softmax(logits)."""
    return -jnp.mean(jnp.sum(target * jax.nn.log_softmax(logits), axis=1))


def make_classifier_loss(classifier, augment: Augment, *, smoothing: float) -> Loss:
    """Cross-entropy of the subgroup, the batch's `label` [B], from `image`, uint8, with label smoothing."""

    def loss(params, frozen, batch, key):
        logits = classifier.apply(params, augment(key, to_pixels(batch["image"])))
        target = jax.nn.one_hot(batch["label"], logits.shape[1])
        target = (1 - smoothing) * target + smoothing / logits.shape[1]
        return cross_entropy(logits, target), {"accuracy": jnp.mean(jnp.argmax(logits, 1) == batch["label"])}

    return loss
