"""The paper's two losses, reflow (Eq. 5) and one-step distillation (Eq. 6), and beside them consistency and progressive
distillation.

The `make_…_loss` functions return a loss `(params, frozen, batch, key) → (scalar, metrics)` for `step.make_train_step`.
The batch holds pairs: "X0", "X1" [B, h, w, c] and the token ids "ids" [B, L] of the prompts. `frozen` holds what is not
trained: "text_encoder", "null_ids" [1, L], for LPIPS "vae" and "lpips", and for progressive distillation "teacher".
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from instaflow_jax import flow, solvers, teacher
from instaflow_jax.arrays import (
    AnyArray,
    Batch,
    Context,
    Image,
    Key,
    Latent,
    Network,
    NullContext,
    PerSample,
    Scalar,
    TokenIds,
    VelocityAt,
)
from instaflow_jax.infra.images import to_pixels
from instaflow_jax.train.step import Loss, Metrics

BUCKETS = 4  # intervals of t for which the error is logged separately
Times = Callable[[Key, int], PerSample]
Penalty = Callable[[Latent], PerSample]
Renew = Callable[[Batch, Key], tuple[Batch, Key]]
Split = Callable[[AnyArray], tuple[Array, Array]]
Bind = Callable[[Network, Context, NullContext], VelocityAt]
Distance = Callable[[Mapping[str, Any], Latent, Mapping[str, Any], Key], tuple[Scalar, Metrics]]


# ---------------------------------------------------------------- the distribution of t


def uniform(key: Key, count: int) -> PerSample:
    """t uniform on [0, 1), as in the paper."""
    return jax.random.uniform(key, (count,))


def u_shaped(key: Key, count: int, a: float = 4.0) -> PerSample:
    """p(u) ∝ e^{au} + e^{−au} for u = 2t − 1, which is highest at noise and at data (arXiv 2405.20320).

    Sampled with the inverse of the cumulative distribution (sinh(au) / sinh(a) + 1) / 2.
    """
    q = jax.random.uniform(key, (count,))
    return (jnp.arcsinh((2 * q - 1) * jnp.sinh(a)) / a + 1) / 2


# ---------------------------------------------------------------- the penalty on an error


def squared(error: Latent) -> PerSample:
    """‖e‖² per latent dimension."""
    return jnp.mean(error**2, axis=(1, 2, 3))


def pseudo_huber(error: Latent) -> PerSample:
    """√(‖e‖² + c²) − c with c = 0.00054·d for d dimensions, divided by √d: robust to outliers (arXiv 2405.20320)."""
    d = error[0].size
    c = 0.00054 * d
    return (jnp.sqrt(jnp.sum(error**2, axis=(1, 2, 3)) + c**2) - c) / d**0.5


def elementwise_huber(error: Latent) -> PerSample:
    """Mean over the latent dimensions of √(e² + c²) − c with c = 0.001 (arXiv 2410.07303)."""
    return jnp.mean(jnp.sqrt(error**2 + 1e-6) - 1e-3, axis=(1, 2, 3))


TIMES: dict[str, Times] = {"uniform": uniform, "u_shaped": u_shaped}
PENALTIES: dict[str, Penalty] = {
    "squared": squared,
    "pseudo_huber": pseudo_huber,
    "elementwise_huber": elementwise_huber,
}


# ---------------------------------------------------------------- the noise of a pair


def paired(batch: Batch, key: Key) -> tuple[Batch, Key]:
    """The pairs as they are, and the key for the rest of the loss."""
    return batch, key


def fresh(batch: Batch, key: Key) -> tuple[Batch, Key]:
    """The pairs with another X0, independent of X1."""
    noise_key, key = jax.random.split(key)
    return {**batch, "X0": jax.random.normal(noise_key, batch["X1"].shape)}, key


NOISES: dict[str, Renew] = {"paired": paired, "fresh": fresh}


def choose(table: Mapping[str, Any], field: str, name: str) -> Any:
    """The entry called `name`. Raises ValueError, with the choices, if there is none."""
    if name not in table:
        raise ValueError(f"{field}={name!r} is unknown: use one of {', '.join(table)}")
    return table[name]


# ---------------------------------------------------------------- the losses on pairs


def make_reflow_loss(
    unet, text_encoder, *, time: str, penalty: str, noise: str, prompt_dropout: float, num_timesteps: int
) -> Loss:
    """Eq. 5: the velocity at a random point of the straight path from X0 to X1 is trained to be X1 − X0.

    With fresh noise this is ordinary flow matching: Xt then has the marginals t X1 + (1 − t) eps with eps independent
    of X1, so that Xt + (1 − t) v(Xt, t) is the mean of X1 given Xt, which gives the score (Tweedie's formula).

    Args:
      unet, text_encoder: networks; `params` are the unet's.
      time: "uniform" or "u_shaped".
      penalty: "squared", "pseudo_huber" or "elementwise_huber".
      noise: "paired" takes the pair's own X0, "fresh" draws another one at each step.
      prompt_dropout: share of prompts replaced by the empty one, so that guidance stays possible.
      num_timesteps: the network's timestep at noise (`flow.timestep`).

    Raises:
      ValueError: an unknown time, penalty or noise.
    """
    errors = make_errors(unet, text_encoder, prompt_dropout, num_timesteps)
    return make_line_loss(
        lambda params, frozen, batch, t, key: (t, errors(params, frozen, batch, t, key)[1]),
        time=time,
        penalty=penalty,
        noise=noise,
    )


def make_diffusion_loss(
    unet, text_encoder, schedule: teacher.Schedule, *, time: str, penalty: str, noise: str, prompt_dropout: float
) -> Loss:
    """Rectified diffusion (arXiv 2410.07303): Eq. 5 for a network that keeps its teacher's head and noise schedule.

    The network sees x = α X1 + σ X0 with the pair's own noise. In the flow's variable x / (α + σ) that is the same
    straight line; the error is that of the predicted X1, (1 − t) times the velocity's. Where it is 0, the network's
    ODE is solved by one DDIM step.

    Args:
      schedule: the teacher's.
      time: "uniform" or "u_shaped", over the schedule's timesteps from noise to data.
      unet, text_encoder, penalty, noise, prompt_dropout: as for `make_reflow_loss`.

    Raises:
      ValueError: an unknown time, penalty or noise.
    """
    t_of = jnp.asarray(teacher.flow_times(schedule), jnp.float32)
    T = len(t_of)

    def errors(params, frozen, batch, u, key):
        X0, X1 = batch["X0"].astype(jnp.float32), batch["X1"].astype(jnp.float32)
        tau = T - 1 - jnp.floor(u * T).astype(jnp.int32)
        t = t_of[tau]
        text = encode(text_encoder, frozen, batch["ids"], prompt_dropout, key)
        velocity_at = teacher.make_velocity_at(lambda x, tau: unet.apply(params, x, tau, text), schedule)
        v = velocity_at(flow.interpolate(X0, X1, t), t, tau)
        return t, (1 - t)[:, None, None, None] * (v - flow.velocity_target(X0, X1))

    return make_line_loss(errors, time=time, penalty=penalty, noise=noise)


def make_line_loss(errors: Callable, *, time: str, penalty: str, noise: str) -> Loss:
    """The mean penalty of errors at random points of the straight lines from X0 to X1.

    Args:
      errors: `errors(params, frozen, batch, t, key) → (t, error)` at the drawn times [B]; it returns the flow time of
        the point it took, at which the error is logged.
      time, penalty, noise: as for `make_reflow_loss`.

    Raises:
      ValueError: an unknown time, penalty or noise.
    """
    times, measure = choose(TIMES, "time", time), choose(PENALTIES, "penalty", penalty)
    renew = choose(NOISES, "noise", noise)

    def loss(params, frozen, batch, key):
        batch, key = renew(batch, key)
        time_key, error_key = jax.random.split(key)
        t, error = errors(params, frozen, batch, times(time_key, len(batch["X0"])), error_key)
        return jnp.mean(measure(error)), buckets(t, squared(error))

    return loss


def make_distill_loss(
    unet, text_encoder, distance: Distance, *, match: float, penalty: str, prompt_dropout: float, num_timesteps: int
) -> Loss:
    """Eq. 6: one Euler step from noise, X0 + v(X0, 0), is trained to be X1, as measured by `distance`.

    A share of the batch may keep matching the velocity at t > 0 (Eq. 5) on the same pairs, so that the student stays
    usable with 2 and 4 steps. The network sees both parts as one batch, because X0 is the path's point at t = 0.

    Args:
      distance: from `make_latent_distance` or `make_lpips_distance`; (frozen, X1_hat, batch, key) → (scalar, metrics).
      match: share of the batch, in [0, 1), that matches velocities instead.
      penalty: of these velocities' errors, as for `make_reflow_loss`.

    Raises:
      ValueError: match is outside [0, 1), or an unknown penalty.
    """
    if not 0 <= match < 1:
        raise ValueError(f"match={match} must be a share in [0, 1): use less than 1, so that some pairs are distilled")
    measure = choose(PENALTIES, "penalty", penalty)
    errors = make_errors(unet, text_encoder, prompt_dropout, num_timesteps)

    def loss(params, frozen, batch, key):
        time_key, drop_key, distance_key = jax.random.split(key, 3)
        count = len(batch["X0"])
        matched, split = make_split(count, match)
        t = jnp.where(matched, uniform(time_key, count), 0.0)
        v, error = errors(params, frozen, batch, t, drop_key)

        rest = {name: split(rows)[1] for name, rows in batch.items()}
        value, metrics = distance(frozen, rest["X0"].astype(jnp.float32) + split(v)[1], rest, distance_key)
        matching = split(measure(error))[0]
        if not len(matching):
            return value, metrics
        share, matching = len(matching) / count, jnp.mean(matching)
        return (1 - share) * value + share * matching, metrics | {"matching": matching}

    return loss


def make_consistency_loss(
    unet, text_encoder, *, steps: Sequence[int], penalty: str, prompt_dropout: float, num_timesteps: int
) -> Loss:
    """Consistency training on the pairs' straight paths, for sampling with any of the numbers of steps N in `steps`.

    For each sample N is drawn from `steps`, then one of the N Euler steps, from t to t' = t + 1/N. The X1 predicted at
    t, f(Xt, t) = Xt + (1 − t) v(Xt, t), is trained to be the one predicted at t', without a gradient. At t' = 1 that
    is the pair's X1, so N = 1 is Eq. 6, and larger N carry X1 back along the line. f and both points on one line are
    Consistency-FM's (arXiv 2407.02398), which has independent noise and one small t' − t. The target takes the trained
    weights and not their moving average, as there and in iCT (2310.14189). The weight of the error is max(SNR, 1) with
    SNR = t² / (1 − t)² (2202.00512): with equal weights, velocities near data, which a sampler of many steps needs,
    would count little.

    Args:
      steps: at least one number of steps.
      penalty: of the error, as for `make_reflow_loss`.

    Raises:
      ValueError: one of `steps` is not an integer of at least 1, or an unknown penalty.
    """
    measure = choose(PENALTIES, "penalty", penalty)
    for N in steps:
        solvers.flow_times(N)  # refuses what is not a number of steps

    def loss(params, frozen, batch, key):
        time_key, drop_key = jax.random.split(key)
        X0, X1 = batch["X0"].astype(jnp.float32), batch["X1"].astype(jnp.float32)
        text = encode(text_encoder, frozen, batch["ids"], prompt_dropout, drop_key)
        t, t_next = draw_step(time_key, steps, len(X0))

        def predict(t: PerSample) -> Latent:
            Xt = flow.interpolate(X0, X1, t)
            v = unet.apply(params, Xt, flow.timestep(t, num_timesteps), text)
            return Xt + (1 - t)[:, None, None, None] * v

        error = predict(t) - lax.stop_gradient(predict(t_next))
        return jnp.mean(jnp.maximum(1, t / (1 - t)) ** 2 * measure(error)), buckets(t, squared(error))

    return loss


def draw_step(key: Key, steps: Sequence[int], count: int) -> tuple[PerSample, PerSample]:
    """Beginning and end of random Euler steps: of N steps from 0 to 1, N drawn from `steps`, one of the N."""
    N_key, step_key = jax.random.split(key)
    N = jax.random.choice(N_key, jnp.asarray(steps, jnp.int32), (count,))
    i = jax.random.randint(step_key, (count,), 0, N)
    return i / N, (i + 1) / N


def make_split(count: int, share: float) -> tuple[Bool[Array, " B"], Split]:
    """Chooses a share of a batch's rows: whether each row is chosen, and `split(rows [B, ...]) → (chosen, others)`.

    The chosen rows are spread evenly, so that a batch that is split over devices stays on them; pairs are shuffled.
    """
    chosen = round(share * count)
    blocks = math.gcd(chosen, count)
    size, first = count // blocks, chosen // blocks

    def split(rows):
        parts = rows.reshape(blocks, size, *rows.shape[1:])
        return tuple(part.reshape(-1, *rows.shape[1:]) for part in (parts[:, :first], parts[:, first:]))

    return jnp.arange(count) % size < first, split


def make_errors(unet, text_encoder, prompt_dropout: float, num_timesteps: int) -> Callable:
    """`errors(params, frozen, batch, t, key) → (v, v − (X1 − X0))`: velocities at time t, and their errors."""

    def errors(params, frozen, batch, t: PerSample, key: Key) -> tuple[Latent, Latent]:
        X0, X1 = batch["X0"].astype(jnp.float32), batch["X1"].astype(jnp.float32)
        text = encode(text_encoder, frozen, batch["ids"], prompt_dropout, key)
        v = unet.apply(params, flow.interpolate(X0, X1, t), flow.timestep(t, num_timesteps), text)
        return v, v - flow.velocity_target(X0, X1)

    return errors


def encode(text_encoder, frozen, ids: TokenIds, prompt_dropout: float, key: Key) -> Context:
    """The embeddings of the prompts, of which a random share is replaced by the empty one."""
    ids = drop_prompts(key, ids, frozen["null_ids"], prompt_dropout)
    return text_encoder.apply(frozen["text_encoder"], ids).last_hidden_state


def drop_prompts(key: Key, ids: TokenIds, null_ids: Int[AnyArray, "1 L"], share: float) -> TokenIds:
    """Replaces a random share of the prompts by the empty one, null_ids [1, L]."""
    dropped = jax.random.bernoulli(key, share, (len(ids), 1))
    return jnp.where(dropped, null_ids, ids)


def buckets(t: PerSample, error: PerSample) -> Metrics:
    """Mean error in each quarter of t, from "error_t0" nearest to noise; 0 for a quarter without samples."""
    member = jnp.floor(t * BUCKETS)[None] == jnp.arange(BUCKETS)[:, None]
    means = jnp.sum(member * error, axis=1) / jnp.maximum(jnp.sum(member, axis=1), 1)
    return {f"error_t{i}": means[i] for i in range(BUCKETS)}


# ---------------------------------------------------------------- progressive distillation


class Grid(NamedTuple):
    """The 2N steps of a teacher, two for each of its student's N steps; float64.

    Attributes:
      t: where the steps begin, and after the last of them its end: from 0 to 1, [2N + 1].
      tau: what the teacher's network takes as time at the beginning of each step, [2N].
    """

    t: np.ndarray
    tau: np.ndarray


def make_progressive_loss(
    unet, text_encoder, bind: Bind, grid: Grid, *, prompt_dropout: float, num_timesteps: int
) -> Loss:
    """A round of progressive distillation (arXiv 2202.00512): one step of the student is trained to land where two of
    its teacher land.

    In the flow's variable a DDIM step is an Euler step (`teacher.teacher_velocity`), so the student's velocity has the
    target `two_steps`. It is trained at the N times at which it will be evaluated, on the straight path from fresh
    noise to X1; the pair's own X0 is not used. The paper's weight max(SNR, 1) of the squared error of the predicted
    data is max(t, 1 − t)² for that of the velocity, because D = Z + (1 − t) v and SNR = t² / (1 − t)².

    Args:
      unet, text_encoder: networks; `params` are the student's unet, frozen["teacher"] the teacher's.
      bind: `bind(network, text, null)` gives the teacher's velocity, with its guidance.
      grid: the teacher's steps.
      prompt_dropout: share of prompts replaced by the empty one, for teacher and student alike.
      num_timesteps: the student's timestep at noise (`flow.timestep`).
    """
    times = jnp.asarray(grid.t[:-1], jnp.float32)

    def loss(params, frozen, batch, key):
        noise_key, time_key, drop_key = jax.random.split(key, 3)
        X1 = batch["X1"].astype(jnp.float32)
        X0 = jax.random.normal(noise_key, X1.shape)
        first = 2 * jax.random.randint(time_key, (len(X1),), 0, len(grid.tau) // 2)  # of the two steps
        text = encode(text_encoder, frozen, batch["ids"], prompt_dropout, drop_key)
        # By itself: in a batch of B + 1 rows, most rows would move between devices.
        null = text_encoder.apply(frozen["text_encoder"], frozen["null_ids"]).last_hidden_state

        t = times[first]
        Z = flow.interpolate(X0, X1, t)
        teacher = bind(functools.partial(unet.apply, frozen["teacher"]), text, null)
        error = unet.apply(params, Z, flow.timestep(t, num_timesteps), text) - two_steps(teacher, grid, Z, first)
        return jnp.mean(jnp.maximum(t, 1 - t) ** 2 * squared(error)), buckets(t, squared(error))

    return loss


def two_steps(velocity_at: VelocityAt, grid: Grid, Z: Latent, first: Int[Array, " B"]) -> Latent:
    """The mean of a teacher's velocities in its steps `first` and `first + 1` from Z, weighted with their lengths.

    One Euler step with it over both steps lands where the teacher's two steps land.
    """
    t, tau, length = (jnp.asarray(values, jnp.float32) for values in (grid.t, grid.tau, np.diff(grid.t)))
    h, h_next = (length[step][:, None, None, None] for step in (first, first + 1))
    v = velocity_at(Z, t[first], tau[first])
    v_next = velocity_at(Z + h * v, t[first + 1], tau[first + 1])
    return (h * v + h_next * v_next) / (h + h_next)


# ---------------------------------------------------------------- the distances of Eq. 6


def make_latent_distance(penalty: str) -> Distance:
    """The penalty on the error of the latents, as for `make_reflow_loss`; the first phase of the paper has "squared".

    Raises:
      ValueError: an unknown penalty.
    """
    measure = choose(PENALTIES, "penalty", penalty)

    def distance(frozen, X1_hat, batch, key):
        error = X1_hat - batch["X1"]
        return jnp.mean(measure(error)), {"l2": jnp.mean(squared(error))}

    return distance


def make_lpips_distance(vae, lpips, *, l2: float, crop: int, margin: int) -> Distance:
    """LPIPS of the decoded latents plus `l2` times their squared error, for the second phase of the paper.

    Args:
      vae, lpips: networks whose parameters are frozen["vae"] and frozen["lpips"].
      crop: height and width, in latents, of the random crop that is compared; 0 compares complete images. With crop=0
        the batch may hold "target", the decoded X1 as bytes [B, H, W, 3], to save decoding it at every step.
      margin: latents decoded around the crop and then cut off, because a decoder errs near the edges of its input.
    """

    def distance(frozen, X1_hat, batch, key):
        X1 = batch["X1"].astype(jnp.float32)
        if "target" in batch and not crop:
            image, target = decode(vae, frozen, X1_hat), to_pixels(batch["target"])
        else:
            pair = jnp.concatenate([X1_hat, X1], axis=-1)
            if crop:
                pair = random_crop(key, pair, crop + 2 * margin)
            edge = margin * vae.config.factor if crop else 0
            # Decode one after the other: the target needs no gradient, which saves its backward pass and memory.
            image, target = (trim(decode(vae, frozen, z), edge) for z in jnp.split(pair, 2, axis=-1))
        perceptual = jnp.mean(lpips.apply(frozen["lpips"], image, lax.stop_gradient(target)))
        latent = jnp.mean(squared(X1_hat - X1))
        return perceptual + l2 * latent, {"lpips": perceptual, "l2": latent}

    return distance


def decode(vae, frozen: Mapping[str, Any], latents: Latent) -> Float[Array, "B h w 3"]:
    """Latents to pixels, in about [−1, 1]."""
    return vae.apply(frozen["vae"], latents, method="decode")


def random_crop(key: Key, latents: Latent, size: int) -> Float[Array, "B {size} {size} C"]:
    """Crops of `size` × `size` at a random position in each sample.

    Raises:
      ValueError: the latents are smaller than the crop.
    """
    count, h, w, channels = latents.shape
    if size > min(h, w):
        raise ValueError(
            f"a crop of {size}×{size} latents, margins included, does not fit into {h}×{w}: "
            "use a smaller crop or margin, or crop=0"
        )
    limit = jnp.array([h - size + 1, w - size + 1])
    corners = jax.random.randint(key, (count, 2), 0, limit)
    return jax.vmap(lambda z, corner: lax.dynamic_slice(z, (*corner, 0), (size, size, channels)))(latents, corners)


def trim(images: Image, edge: int) -> Float[AnyArray, "B h w 3"]:
    """Cuts `edge` pixels off every side."""
    return images[:, edge : images.shape[1] - edge, edge : images.shape[2] - edge]
