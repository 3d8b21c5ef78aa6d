"""The two losses of distribution matching (DMD, arXiv 2311.18828; DMD2, 2405.14867), for flows.

A one-step student makes x = Z + v(Z, 0) from noise Z. Its distribution moves towards that of the pairs' X1 along the
difference of two scores: that of the data, which a frozen flow knows (the real score), and that of the student's own
images, which a second flow learns while the student changes (the fake score). Both flows are trained with independent
noise, so Xt + (1 − t) v(Xt, t) is the mean of X1 given Xt; the difference of these means is that of the scores, times
(1 − t)² / t.

The losses take the batch of `train.losses`. If it holds "real_X1" and "real_ids", these are real images and their
captions, which the discriminator sees in place of the pairs' X1. `frozen` holds "text_encoder", "null_ids", "real" (the
real score), and the parameters of the network that the other loss trains, "fake" or "student".
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from instaflow_jax import flow
from instaflow_jax.arrays import Batch, Context, Key, Latent, Params, PerSample, Scalar, Timestep
from instaflow_jax.train import losses
from instaflow_jax.train.losses import squared
from instaflow_jax.train.step import Loss, Metrics

HEAD = "head."  # begins the names of the discriminator's parameters, which stand among those of the fake score


class Method(NamedTuple):
    """What both losses share.

    Attributes:
      student, score: networks; the score's serves as the real and as the fake score.
      text_encoder: of both.
      head: `models.discriminator`'s network for the score's middle block; None without adversarial losses.
      t: the least and the largest time at which images are compared.
      prompt_dropout: share of prompts replaced by the empty one.
      num_timesteps: the networks' timestep at noise (`flow.timestep`).
    """

    student: Any
    score: Any
    text_encoder: Any
    head: Any
    t: tuple[float, float]
    prompt_dropout: float
    num_timesteps: int


class Noised(NamedTuple):
    """Images on their way from noise.

    Attributes:
      eps: the noise.
      t: one time for each image.
      Xt: t x + (1 − t) eps.
      tau: t as a network takes it.
    """

    eps: Latent
    t: PerSample
    Xt: Latent
    tau: Timestep


def make_student_loss(method: Method, *, matching: float, regression: float, adversarial: float) -> Loss:
    """The student's loss: DMD's gradient and two optional terms.

    Args:
      matching: weight of DMD's gradient.
      regression: share of the batch, in [0, 1), that regresses the pair's X1 from the pair's X0 (Eq. 6) instead.
      adversarial: weight of the logistic loss by which the discriminator should take the student's images for real.

    Raises:
      ValueError: regression is outside [0, 1).
    """
    if not 0 <= regression < 1:
        raise ValueError(f"regression={regression} must be a share in [0, 1): use less than 1, or configs/distill.py")

    def loss(params, frozen, batch, key):
        noise_key, drop_key, noised_key = jax.random.split(key, 3)
        text, count = encode(method, frozen, batch, drop_key), len(batch["X1"])
        from_pairs, split = losses.make_split(count, regression)
        noise = jax.random.normal(noise_key, batch["X1"].shape)
        Z = jnp.where(from_pairs[:, None, None, None], batch["X0"], noise)
        regressed, x = split(draw(method, params, Z, text))

        value, metrics = distribution_loss(frozen, x, split(text)[1], noised_key)
        if not len(regressed):
            return value, metrics
        error, share = jnp.mean(squared(regressed - split(batch["X1"])[0])), len(regressed) / count
        return (1 - share) * value + share * error, metrics | {"regression": error}

    def distribution_loss(frozen, x: Latent, text: Context, key: Key) -> tuple[Scalar, Metrics]:
        noised = add_noise(method, key, x)
        fixed = lax.stop_gradient(noised)
        v_real = method.score.apply(frozen["real"], fixed.Xt, fixed.tau, text)
        if not adversarial:
            v_fake = method.score.apply(frozen["fake"], fixed.Xt, fixed.tau, text)
            value, metrics = match_scores(x, fixed, v_real, v_fake)
            return matching * value, metrics
        v_fake, features = method.score.apply(frozen["fake"], noised.Xt, noised.tau, text, method="with_middle")
        value, metrics = match_scores(x, fixed, v_real, v_fake)
        fooling = jnp.mean(jax.nn.softplus(-logits(method, frozen["fake"], features)))
        return matching * value + adversarial * fooling, metrics | {"adversarial": fooling}

    return loss


def match_scores(x: Latent, noised: Noised, v_real: Latent, v_fake: Latent) -> tuple[Scalar, Metrics]:
    """A loss whose gradient by x, times the number of values, is (X1_fake − X1_real) / mean |x − X1_real|.

    X1_real and X1_fake are the means of X1 given Xt by the two scores. The divisor, one for each sample, makes
    gradients of all times alike (DMD, Eq. 8). Only the x of a squared error is differentiated.
    """
    x_fixed, v_real, v_fake = lax.stop_gradient((x, v_real, v_fake))
    rest = (1 - noised.t)[:, None, None, None]
    X1_real, X1_fake = noised.Xt + rest * v_real, noised.Xt + rest * v_fake
    scale = jnp.mean(jnp.abs(x_fixed - X1_real), axis=(1, 2, 3), keepdims=True)
    target = x_fixed - (X1_fake - X1_real) / scale
    return 0.5 * jnp.mean(squared(x - target)), {"score_gap": jnp.mean(jnp.abs(X1_fake - X1_real))}


def make_fake_loss(method: Method, *, adversarial: float) -> Loss:
    """The fake score's loss: flow matching on the student's images, with fresh noise.

    Args:
      adversarial: weight of the logistic loss of the discriminator, which tells the student's images from the pairs'
        X1 or the real images, noised to the same times; 0 turns it off.
    """

    def loss(params, frozen, batch, key):
        noise_key, drop_key, fake_key, real_key = jax.random.split(key, 4)
        text = encode(method, frozen, batch, drop_key)
        Z = jax.random.normal(noise_key, batch["X1"].shape)
        x = lax.stop_gradient(draw(method, frozen["student"], Z, text))
        fake = add_noise(method, fake_key, x)
        target = flow.velocity_target(fake.eps, x)
        if not adversarial:
            return jnp.mean(squared(method.score.apply(params, fake.Xt, fake.tau, text) - target)), {}
        v, features = method.score.apply(params, fake.Xt, fake.tau, text, method="with_middle")
        value, eps = jnp.mean(squared(v - target)), jax.random.normal(real_key, x.shape)
        real_X1, real_text = real_images(method, frozen, batch, text, drop_key)
        real = flow.interpolate(eps, real_X1.astype(jnp.float32), fake.t)
        real_features = method.score.apply(params, real, fake.tau, real_text, method="middle")
        on_fake, on_real = (logits(method, params, each) for each in (features, real_features))
        logistic = jnp.mean(jax.nn.softplus(on_fake) + jax.nn.softplus(-on_real))
        accuracy = (jnp.mean(on_fake < 0) + jnp.mean(on_real > 0)) / 2
        return value + adversarial * logistic, {"flow_matching": value, "accuracy": accuracy}

    return loss


# ---------------------------------------------------------------- parts


def encode(method: Method, frozen, batch: Batch, key: Key) -> Context:
    """The embeddings of the batch's prompts."""
    return losses.encode(method.text_encoder, frozen, batch["ids"], method.prompt_dropout, key)


def real_images(method: Method, frozen, batch: Batch, text: Context, key: Key) -> tuple[Latent, Context]:
    """What the discriminator should take for real, and its text: the real images of the batch, or else the pairs' X1.

    Args:
      text: of the pairs' prompts.
      key: from which that text's dropout was drawn.
    """
    if "real_X1" not in batch:
        return batch["X1"], text
    return batch["real_X1"], encode(method, frozen, {"ids": batch["real_ids"]}, jax.random.fold_in(key, 1))


def draw(method: Method, params: Params, Z: Latent, text: Context) -> Latent:
    """The student's images, by one Euler step from noise."""
    tau = jnp.full(len(Z), flow.timestep(jnp.float32(0), method.num_timesteps))
    return Z + method.student.apply(params, Z, tau, text)


def add_noise(method: Method, key: Key, x: Latent) -> Noised:
    """Fresh noise at times that are uniform between the two of `method.t`."""
    time_key, noise_key = jax.random.split(key)
    t = jax.random.uniform(time_key, (len(x),), minval=method.t[0], maxval=method.t[1])
    eps = jax.random.normal(noise_key, x.shape)
    return Noised(eps, t, flow.interpolate(eps, x, t), flow.timestep(t, method.num_timesteps))


def logits(method: Method, params: Params, features) -> PerSample:
    """The discriminator's logit of "real" for each image."""
    head = {name.removeprefix(HEAD): value for name, value in params.items() if name.startswith(HEAD)}
    return method.head.apply(head, features)
