"""The two losses of distribution matching (DMD, arXiv 2311.18828; DMD2, 2405.14867), for flows.

A one-step student makes x = Z + v(Z, 0) from noise Z. Its distribution moves towards that of the data along the
difference of two scores: that of the data, which a frozen network knows (the real score), and that of the student's own
images, which a second network learns while the student changes (the fake score). Both are flows that were trained with
independent noise, or teachers, which `Convention` reads as such flows. So Xt + (1 − t) v(Xt, t) is the mean of X1 given
Xt; the difference of these means is that of the scores, times (1 − t)² / t.

The losses take the batch of `train.losses`. If it holds "real_X1" and "real_ids", these are real images and their
captions, which the discriminator sees in place of the pairs' X1. `frozen` holds "text_encoder", "null_ids", "real" (the
real score), and the parameters of the network that the other loss trains, "fake" or "student".
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool

from instaflow_jax import flow, teacher
from instaflow_jax.arrays import (
    AnyArray,
    Batch,
    Context,
    Key,
    Latent,
    Params,
    PerSample,
    Predict,
    Scalar,
    Timestep,
)
from instaflow_jax.train import losses
from instaflow_jax.train.losses import squared
from instaflow_jax.train.step import Loss, Metrics

HEAD = "head."  # begins the names of the discriminator's parameters, which stand among those of the fake score


class Convention(NamedTuple):
    """How a score's network is asked about Xt on the straight path, and what its output means.

    Attributes:
      ends: the least and the largest t that it knows.
      inputs: (Xt, t) → (x, tau), as the network takes them.
      velocity: (output, x, t) → the mean of X1 − eps given Xt.
      weight: t → the weight with which the velocity's squared error is that of the network's own output.
    """

    ends: tuple[float, float]
    inputs: Callable[[Latent, PerSample], tuple[Latent, Timestep]]
    velocity: Callable[[Latent, Latent, PerSample], Latent]
    weight: Callable[[PerSample], PerSample]


def flow_convention(num_timesteps: int) -> Convention:
    """Of a flow, whose timestep at noise is `num_timesteps`."""
    return Convention(
        (0.0, 1.0), lambda Xt, t: (Xt, flow.timestep(t, num_timesteps)), lambda out, x, t: out, jnp.ones_like
    )


def teacher_convention(schedule: teacher.Schedule) -> Convention:
    """Of a noise predictor (or one of v or X1), see `teacher.teacher_velocity`."""
    low, high = teacher.flow_ends(schedule)
    tau_at = teacher.make_tau_at(schedule)
    return Convention(
        (float(low), float(high)),
        lambda Xt, t: (teacher.network_input(Xt, t), tau_at(t)),
        functools.partial(teacher.output_velocity, schedule),
        functools.partial(teacher.output_weight, schedule),
    )


class Method(NamedTuple):
    """What both losses share.

    Attributes:
      student, score: networks; the score's serves as the real and as the fake score.
      text_encoder: of both.
      head: `models.discriminator`'s network for the score's middle block; None without adversarial losses.
      convention: of the score.
      alpha: guidance of the real score (Eq. 7); 1 takes it as it is.
      steps: numbers of Euler steps N for which the student is refined; see `draw`.
      t: the least and the largest time at which images are compared.
      prompt_dropout: share of prompts replaced by the empty one.
      num_timesteps: the student's timestep at noise (`flow.timestep`).
      unroll: whether the student's earlier steps are compiled one by one and not as a loop.
    """

    student: Any
    score: Any
    text_encoder: Any
    head: Any
    convention: Convention
    alpha: float
    steps: tuple[int, ...]
    t: tuple[float, float]
    prompt_dropout: float
    num_timesteps: int
    unroll: bool


class Noised(NamedTuple):
    """Images on their way from noise.

    Attributes:
      eps: the noise.
      t: one time for each image.
      Xt: t x + (1 − t) eps.
    """

    eps: Latent
    t: PerSample
    Xt: Latent


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
        steps_key = jax.random.fold_in(noise_key, 1)
        text, count = encode(method, frozen, batch, drop_key), len(batch["X1"])
        from_pairs, split = losses.make_split(count, regression)
        noise = jax.random.normal(noise_key, batch["X1"].shape)
        Z = jnp.where(from_pairs[:, None, None, None], batch["X0"], noise)
        regressed, x = split(draw(method, params, Z, text, steps_key, from_noise=from_pairs))

        value, metrics = distribution_loss(frozen, x, split(text)[1], noised_key)
        if not len(regressed):
            return value, metrics
        error, share = jnp.mean(squared(regressed - split(batch["X1"])[0])), len(regressed) / count
        return (1 - share) * value + share * error, metrics | {"regression": error}

    def distribution_loss(frozen, x: Latent, text: Context, key: Key) -> tuple[Scalar, Metrics]:
        noised = add_noise(method, key, x)
        fixed = lax.stop_gradient(noised)
        v_real = velocity(method, real_score(method, frozen, text), fixed)
        fake = functools.partial(method.score.apply, frozen["fake"])
        if not adversarial:
            value, metrics = match_scores(x, fixed, v_real, velocity(method, lambda *at: fake(*at, text), fixed))
            return matching * value, metrics
        v_fake, features = velocity_and_middle(method, lambda *at: fake(*at, text, method="with_middle"), noised)
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
        x = lax.stop_gradient(draw(method, frozen["student"], Z, text, jax.random.fold_in(noise_key, 1)))
        fake, score = add_noise(method, fake_key, x), functools.partial(method.score.apply, params)
        target, weight = flow.velocity_target(fake.eps, x), method.convention.weight(fake.t)
        if not adversarial:
            return jnp.mean(weight * squared(velocity(method, lambda *at: score(*at, text), fake) - target)), {}
        v, features = velocity_and_middle(method, lambda *at: score(*at, text, method="with_middle"), fake)
        value, eps = jnp.mean(weight * squared(v - target)), jax.random.normal(real_key, x.shape)
        real_X1, real_text = real_images(method, frozen, batch, text, drop_key)
        real = flow.interpolate(eps, real_X1.astype(jnp.float32), fake.t)
        real_features = score(*method.convention.inputs(real, fake.t), real_text, method="middle")
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


def draw(
    method: Method,
    params: Params,
    Z: Latent,
    text: Context,
    key: Key,
    from_noise: Bool[AnyArray, " B"] | bool = False,
) -> Latent:
    """The student's images, from noise.

    With steps=(1,) by one Euler step. Otherwise, for each sample, N is drawn from `steps` and then one of the N Euler
    steps; the student makes the steps before it, without a gradient, and the image is the X1 that it predicts there. So
    the student is asked where a sampler of N steps will ask it.

    Args:
      from_noise: samples that are asked at noise in any case.
    """
    if method.steps == (1,):
        t = jnp.zeros(len(Z))
    else:
        t, t_next = losses.draw_step(key, method.steps, len(Z))
        t, h = jnp.where(from_noise, 0.0, t), t_next - t
        Z = lax.stop_gradient(go_to(method, params, Z, text, t, h))
    v = method.student.apply(params, Z, flow.timestep(t, method.num_timesteps), text)
    return Z + (1 - t)[:, None, None, None] * v


def go_to(method: Method, params: Params, Z: Latent, text: Context, t: PerSample, h: PerSample) -> Latent:
    """The student's Euler steps of length h from noise Z to time t, a multiple of h."""

    def step(i, Z):
        now = i * h
        v = method.student.apply(params, Z, flow.timestep(now, method.num_timesteps), text)
        return jnp.where((now < t - h / 2)[:, None, None, None], Z + h[:, None, None, None] * v, Z)

    return lax.fori_loop(0, max(method.steps) - 1, step, Z, unroll=method.unroll)


def real_score(method: Method, frozen, text: Context) -> Predict:
    """The frozen score's network, bound to its prompts and guided."""
    network = functools.partial(method.score.apply, frozen["real"])
    # By itself: in a batch of B + 1 rows, most rows would move between devices. Without guidance nothing computes it.
    null = method.text_encoder.apply(frozen["text_encoder"], frozen["null_ids"]).last_hidden_state
    return flow.guided(network, text, null, method.alpha)


def velocity(method: Method, predict: Predict, noised: Noised) -> Latent:
    """The mean of X1 − eps given Xt, by a score's network."""
    x, tau = method.convention.inputs(noised.Xt, noised.t)
    return method.convention.velocity(predict(x, tau), x, noised.t)


def velocity_and_middle(method: Method, predict: Callable, noised: Noised) -> tuple[Latent, Array]:
    """`velocity`, and the features of the network's middle block, which `predict` gives beside its output."""
    x, tau = method.convention.inputs(noised.Xt, noised.t)
    out, features = predict(x, tau)
    return method.convention.velocity(out, x, noised.t), features


def add_noise(method: Method, key: Key, x: Latent) -> Noised:
    """Fresh noise at times that are uniform between the two of `method.t`, as far as the scores know them."""
    time_key, noise_key = jax.random.split(key)
    (low, high), ends = method.t, method.convention.ends
    t = jax.random.uniform(time_key, (len(x),), minval=max(low, ends[0]), maxval=min(high, ends[1]))
    eps = jax.random.normal(noise_key, x.shape)
    return Noised(eps, t, flow.interpolate(eps, x, t))


def logits(method: Method, params: Params, features) -> PerSample:
    """The discriminator's logit of "real" for each image."""
    head = {name.removeprefix(HEAD): value for name, value in params.items() if name.startswith(HEAD)}
    return method.head.apply(head, features)
