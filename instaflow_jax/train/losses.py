"""The paper's two losses: reflow (Eq. 5) and one-step distillation (Eq. 6).

Each `make_*` chooses its parts once and returns a loss `(params, frozen, batch, key) → (scalar, metrics)` for
`step.make_train_step`. The batch holds pairs: `X0`, `X1` [B, h, w, c] and the prompt's `ids` [B, L]. `frozen` holds what
nobody trains: "text_encoder", "null_ids" [1, L], and for LPIPS "vae" and "lpips".
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from instaflow_jax import flow
from instaflow_jax.arrays import Image, Key, Latent, PerSample, Scalar
from instaflow_jax.train.step import Loss

BUCKETS = 4  # of t, for which the error is told apart
Times = Callable[[Key, int], PerSample]
Penalty = Callable[[Latent], PerSample]


# ---------------------------------------------------------------- when: the distribution of t


def uniform(key: Key, count: int) -> PerSample:
    """t uniform on [0, 1), as in the paper."""
    return jax.random.uniform(key, (count,))


def u_shaped(key: Key, count: int, a: float = 4.0) -> PerSample:
    """p(u) ∝ e^{au} + e^{−au} for u = 2t − 1, which asks most at noise and at data (arXiv 2405.20320).

    Drawn by the inverse of its cumulated distribution, (sinh(au) / sinh(a) + 1) / 2.
    """
    q = jax.random.uniform(key, (count,))
    return (jnp.arcsinh((2 * q - 1) * jnp.sinh(a)) / a + 1) / 2


# ---------------------------------------------------------------- how much: the penalty on an error


def squared(error: Latent) -> PerSample:
    """‖e‖² per latent dimension."""
    return jnp.mean(error**2, axis=(1, 2, 3))


def pseudo_huber(error: Latent) -> PerSample:
    """√(‖e‖² + c²) − c with c = 0.00054·d for d dimensions, per √d: robust to single bad pairs (arXiv 2405.20320)."""
    d = error[0].size
    c = 0.00054 * d
    return (jnp.sqrt(jnp.sum(error**2, axis=(1, 2, 3)) + c**2) - c) / d**0.5


TIMES: dict[str, Times] = {"uniform": uniform, "u_shaped": u_shaped}
PENALTIES: dict[str, Penalty] = {"squared": squared, "pseudo_huber": pseudo_huber}


def choose(table: dict[str, Any], field: str, name: str):
    """The entry called `name`, or a ValueError that names the choices."""
    if name not in table:
        raise ValueError(f"{field}={name!r} is not one of {', '.join(table)}")
    return table[name]


# ---------------------------------------------------------------- what: the two losses


def make_reflow_loss(unet, text_encoder, *, time: str, penalty: str, prompt_dropout: float, num_timesteps: int) -> Loss:
    """Eq. 5: the velocity at a random point of the straight road from X0 to X1 is to be X1 − X0.

    Args:
      unet, text_encoder: networks; `params` are the unet's.
      time: "uniform" or "u_shaped".
      penalty: "squared" or "pseudo_huber".
      prompt_dropout: share of prompts replaced by the empty one, which keeps guidance possible.
      num_timesteps: the network's timestep at noise (`flow.timestep`).

    Raises:
      ValueError: an unknown time or penalty.
    """
    times, measure = choose(TIMES, "time", time), choose(PENALTIES, "penalty", penalty)

    def loss(params, frozen, batch, key):
        time_key, drop_key = jax.random.split(key)
        X0, X1 = batch["X0"].astype(jnp.float32), batch["X1"].astype(jnp.float32)
        t = times(time_key, len(X0))
        text = encode(text_encoder, frozen, drop_prompts(drop_key, batch["ids"], frozen["null_ids"], prompt_dropout))
        v = unet.apply(params, flow.interpolate(X0, X1, t), flow.timestep(t, num_timesteps), text)
        error = v - flow.velocity_target(X0, X1)
        return jnp.mean(measure(error)), buckets(t, squared(error))

    return loss


def make_distill_loss(
    unet, text_encoder, distance: Callable, *, match: float, prompt_dropout: float, num_timesteps: int
) -> Loss:
    """Eq. 6: one Euler step from noise, X0 + v(X0, 0), is to land on X1, as `distance` sees it.

    A share of the batch may go on matching the velocity at t > 0 (Eq. 5) on the same pairs, so that the student is not
    spoilt for 2 and 4 steps; both kinds pass through the network as one batch, since X0 is the road's point at t = 0.

    Args:
      distance: `distance(frozen, X1_hat, batch, key) → (scalar, metrics)`; see `latent_distance`, `make_lpips_distance`.
      match: share of the batch, in [0, 1), that matches velocities instead.

    Raises:
      ValueError: match is outside [0, 1).
    """
    if not 0 <= match < 1:
        raise ValueError(f"match={match} must be a share in [0, 1): at 1 nothing would be distilled")

    def loss(params, frozen, batch, key):
        time_key, drop_key, distance_key = jax.random.split(key, 3)
        X0, X1 = batch["X0"].astype(jnp.float32), batch["X1"].astype(jnp.float32)
        matched = round(match * len(X0))  # the first rows; pairs come shuffled
        t = jnp.where(jnp.arange(len(X0)) < matched, uniform(time_key, len(X0)), 0.0)
        text = encode(text_encoder, frozen, drop_prompts(drop_key, batch["ids"], frozen["null_ids"], prompt_dropout))
        v = unet.apply(params, flow.interpolate(X0, X1, t), flow.timestep(t, num_timesteps), text)

        rest = {name: rows[matched:] for name, rows in batch.items()}
        value, metrics = distance(frozen, X0[matched:] + v[matched:], rest, distance_key)
        if not matched:
            return value, metrics
        matching = jnp.mean(squared(v - flow.velocity_target(X0, X1))[:matched])
        share = matched / len(X0)
        return (1 - share) * value + share * matching, metrics | {"matching": matching}

    return loss


def encode(text_encoder, frozen, ids: Int[Array, "B L"]) -> Float[Array, "B L D"]:
    """Prompt embeddings from the frozen text encoder."""
    return text_encoder.apply(frozen["text_encoder"], ids).last_hidden_state


def drop_prompts(key: Key, ids: Int[Array, "B L"], null_ids: Int[Array, "1 L"], share: float) -> Int[Array, "B L"]:
    """Replaces a random share of the prompts by the empty one."""
    dropped = jax.random.bernoulli(key, share, (len(ids), 1))
    return jnp.where(dropped, null_ids, ids)


def buckets(t: PerSample, error: PerSample) -> dict[str, Scalar]:
    """Mean error in each quarter of t, "error_t0" being nearest to noise; 0 where a quarter got no sample."""
    member = jnp.floor(t * BUCKETS)[None] == jnp.arange(BUCKETS)[:, None]
    means = jnp.sum(member * error, axis=1) / jnp.maximum(jnp.sum(member, axis=1), 1)
    return {f"error_t{i}": means[i] for i in range(BUCKETS)}


# ---------------------------------------------------------------- the distances of Eq. 6


def latent_distance(frozen, X1_hat: Latent, batch, key: Key) -> tuple[Scalar, dict[str, Scalar]]:
    """Squared error of the latents, the paper's first phase."""
    l2 = jnp.mean(squared(X1_hat - batch["X1"]))
    return l2, {"l2": l2}


def make_lpips_distance(vae, lpips, *, l2: float, crop: int, margin: int) -> Callable:
    """LPIPS of the decoded latents, the paper's second phase, plus `l2` times their squared error.

    Args:
      vae, lpips: networks whose parameters are frozen["vae"] and frozen["lpips"].
      crop: latents a side of the random piece that is compared, the same for a pair; 0 for the whole picture. A batch
        may then hold "target", the decoded X1 as bytes [B, H, W, 3], which saves decoding it each time.
      margin: latents decoded around the piece and cut off again, as a decoder errs near the edges of what it sees.
    """

    def distance(frozen, X1_hat, batch, key):
        X1 = batch["X1"].astype(jnp.float32)
        if "target" in batch and not crop:
            ours, target = decode(vae, frozen, X1_hat), batch["target"].astype(jnp.float32) / 127.5 - 1
        else:
            pieces = (
                random_crop(key, jnp.concatenate([X1_hat, X1], axis=-1), crop + 2 * margin)
                if crop
                else (jnp.concatenate([X1_hat, X1], axis=-1))
            )
            # Decoded one after the other: the target has no gradient, so its backward pass and its memory are spared.
            ours, target = (
                trim(decode(vae, frozen, z), margin * vae.config.factor if crop else 0)
                for z in jnp.split(pieces, 2, axis=-1)
            )
        perceptual = jnp.mean(lpips.apply(frozen["lpips"], ours, lax.stop_gradient(target)))
        latent = jnp.mean(squared(X1_hat - X1))
        return perceptual + l2 * latent, {"lpips": perceptual, "l2": latent}

    return distance


def decode(vae, frozen, latents: Latent) -> Image:
    """Latents to pixels, in about [−1, 1]."""
    return vae.apply(frozen["vae"], latents, method="decode")


def random_crop(key: Key, latents: Latent, size: int) -> Latent:
    """A piece of `size` × `size` from a random place in each sample.

    Raises:
      ValueError: the latents are smaller than the piece.
    """
    count, h, w, channels = latents.shape
    if size > min(h, w):
        raise ValueError(
            f"a crop of {size}×{size} latents, margins included, does not fit into {h}×{w}: "
            "make crop or margin smaller, or crop=0"
        )
    limit = jnp.array([h - size + 1, w - size + 1])
    corners = jax.random.randint(key, (count, 2), 0, limit)
    return jax.vmap(lambda z, corner: lax.dynamic_slice(z, (*corner, 0), (size, size, channels)))(latents, corners)


def trim(images: Image, edge: int) -> Image:
    """Cuts `edge` pixels off every side."""
    return images[:, edge : images.shape[1] - edge, edge : images.shape[2] - edge]
