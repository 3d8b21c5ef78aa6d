"""The mathematics of rectified flow (InstaFlow, arXiv 2309.06380), in jax.numpy alone.

Time runs from noise to data: X0 ~ N(0, I) at t = 0, the clean latent X1 at t = 1.
"""

import jax.numpy as jnp
from jaxtyping import Float

from instaflow_jax.arrays import AnyArray, Context, Latent, Network, NullContext, PerSample, Predict, Scalar, Velocity


def interpolate(X0: Latent, X1: Latent, t: PerSample) -> Latent:
    """The straight path from noise to data, Xt = t X1 + (1 - t) X0 (below Eq. 4); t in [0, 1], one per sample."""
    t = t[:, None, None, None]
    return t * X1 + (1 - t) * X0


def velocity_target(X0: Latent, X1: Latent) -> Latent:
    """dXt/dt along that path, the regression target of Eq. 5."""
    return X1 - X0


def timestep(t: PerSample | Scalar, num_timesteps: int = 1000) -> PerSample | Scalar:
    """The real-valued timestep a flow's network is fed: `num_timesteps` at noise (t = 0), falling to 0 at data.

    Released flow checkpoints were trained with num_timesteps = 1000, so theirs starts at 1000.0, one beyond Stable
    Diffusion's 0..999. This is num_timesteps · (1 − t), written so that float32 rounds it half as far.
    """
    return num_timesteps - num_timesteps * t


def guide(v_text: Latent, v_null: Latent, alpha: float | Scalar) -> Latent:
    """Classifier-free guidance of a velocity, or of a teacher's prediction (Eq. 7); alpha = 1 is no guidance."""
    return alpha * v_text + (1 - alpha) * v_null


def guided(network: Network, text: Context, null: NullContext, alpha: float) -> Predict:
    """Binds prompts to `network`, a teacher or a flow.

    Args:
      network: `network(Z [B,H,W,C], tau [B], context [B,L,D]) -> [B,H,W,C]`.
      text: prompt embeddings [B,L,D].
      null: embeddings of the empty or the negative prompt, [B,L,D] or [1,L,D]; unused where alpha <= 1.
      alpha: guidance scale, a Python number because it chooses the program. As in the released code, only alpha > 1
        guides; any smaller value runs the text branch alone.

    Returns:
      `predict(Z, tau)` with tau scalar or [B]; when guiding, one batch of 2B that holds each sample twice in a row,
      with null and with text, so that a batch that is split over devices stays on them.
    """
    if alpha <= 1:
        return lambda Z, tau: network(Z, jnp.broadcast_to(tau, Z.shape[:1]), text)
    return always_guided(network, text, null, alpha)


def always_guided(network: Network, text: Context, null: NullContext, alpha: float | Scalar) -> Predict:
    """`guided` for any alpha, which may be a traced array: one program serves every scale."""
    context = jnp.stack([jnp.broadcast_to(null, text.shape), text], axis=1).reshape(-1, *text.shape[1:])

    def predict(Z, tau):
        tau = jnp.broadcast_to(tau, Z.shape[:1])
        pairs = network(jnp.repeat(Z, 2, axis=0), jnp.repeat(tau, 2), context).reshape(-1, 2, *Z.shape[1:])
        return guide(pairs[:, 1], pairs[:, 0], alpha)

    return predict


def flow_velocity(
    network: Network, text: Context, null: NullContext, alpha: float, num_timesteps: int = 1000
) -> Velocity:
    """The guided velocity field v(Z, t | text) of a flow network (see `guided` and `timestep`)."""
    predict = guided(network, text, null, alpha)
    return lambda Z, t: predict(Z, timestep(t, num_timesteps))


def straightness(v: Float[AnyArray, "N B H W C"]) -> PerSample:
    """S = ∫ E ‖(Z1 − Z0) − v(Zt, t)‖² dt along N Euler steps, per latent dimension; 0 iff the paths are straight.

    Args:
      v: the velocities of the N steps (`solvers.trajectory` with `solvers.euler`).

    Returns:
      One value per sample, so that callers can put an error bar on the mean. Z1 − Z0 is the mean of the velocities; it
      is subtracted before squaring, because in float32 the rounding error of E[v²] − E[v]² would swamp a small S.
    """
    return jnp.mean((v - v.mean(0)) ** 2, axis=(0, 2, 3, 4))
