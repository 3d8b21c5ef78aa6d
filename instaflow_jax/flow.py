"""The mathematics of rectified flow (InstaFlow, arXiv 2309.06380), in jax.numpy alone.

Time runs from noise to data: X0 ~ N(0, I) at t = 0, the clean latent X1 at t = 1.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from instaflow_jax.arrays import Context, Latent, Network, PerSample, Predict, Scalar, Velocity


def interpolate(X0: Latent, X1: Latent, t: PerSample) -> Latent:
    """The straight road from noise to data, Xt = t X1 + (1 - t) X0 (below Eq. 4); t in [0, 1], one per sample."""
    t = t[:, None, None, None]
    return t * X1 + (1 - t) * X0


def velocity_target(X0: Latent, X1: Latent) -> Latent:
    """dXt/dt along that road, the regression target of Eq. 5."""
    return X1 - X0


def clock(t: PerSample | Scalar, steps: int = 1000) -> PerSample | Scalar:
    """The float time a flow's network is fed: `steps` at noise (t = 0), falling to 0 at data.

    Released flow checkpoints were trained with steps = 1000, so their clock starts at 1000.0, one
    beyond Stable Diffusion's 0..999. This is steps (1 - t), written so that float32 rounds it half as far.
    """
    return steps - steps * t


def guide(v_text: Latent, v_null: Latent, alpha: float) -> Latent:
    """Classifier-free guidance of a velocity, or of a teacher's prediction (Eq. 7); alpha = 1 is no guidance."""
    return alpha * v_text + (1 - alpha) * v_null


def guided(network: Network, text: Context, null: Context, alpha: float) -> Predict:
    """Binds prompts to `network`; serves the teacher and the flow alike.

    Args:
      network: `network(Z [B,H,W,C], tau [B], context [B,L,D]) -> [B,H,W,C]`.
      text: prompt embeddings [B,L,D].
      null: embeddings of the empty or the negative prompt, [B,L,D] or [1,L,D]; unused where alpha <= 1.
      alpha: guidance, a Python number, since it chooses the program. As in the released code only
        alpha > 1 guides: anything less runs the text branch alone.

    Returns:
      `predict(Z, tau)` with tau scalar or [B]; when guiding, one batch of 2B in the order [null, text].
    """
    if alpha <= 1:
        return lambda Z, tau: network(Z, jnp.broadcast_to(tau, Z.shape[:1]), text)
    return always_guided(network, text, null, alpha)


def always_guided(network: Network, text: Context, null: Context, alpha: float | Scalar) -> Predict:
    """`guided` without a look at alpha, which may be an array: one program then serves every scale."""
    context = jnp.concatenate([jnp.broadcast_to(null, text.shape), text])

    def predict(Z, tau):
        tau = jnp.broadcast_to(tau, Z.shape[:1])
        both = network(jnp.concatenate([Z, Z]), jnp.concatenate([tau, tau]), context)
        v_null, v_text = jnp.split(both, 2)
        return guide(v_text, v_null, alpha)

    return predict


def flow_velocity(network: Network, text: Context, null: Context, alpha: float, steps: int = 1000) -> Velocity:
    """The guided velocity field v(Z, t | text) of a flow network whose clock counts `steps` (see `guided`)."""
    predict = guided(network, text, null, alpha)
    return lambda Z, t: predict(Z, clock(t, steps))


def euler(velocity: Velocity, X0: Latent, N: int) -> Latent:
    """X1 by N Euler steps Z += v(Z, i/N) / N, as one scan.

    The state is kept in float32 or better: in bfloat16 the increments v/N would be lost.

    Raises:
      ValueError: N is not a whole number of at least 1.
    """
    Z, _ = lax.scan(lambda Z, t: (_euler_step(velocity, Z, t, N)[0], None), _state(X0), _times(N)[:-1])
    return Z


def euler_loop(velocity: Velocity, X0: Latent, N: jax.Array) -> Latent:
    """`euler` for an N that is only known when the program runs, so that one program serves any number of steps.

    It cannot be differentiated backwards, and takes its word for N >= 1.
    """
    return lax.fori_loop(0, N, lambda i, Z: _euler_step(velocity, Z, (i / N).astype(jnp.float32), N)[0], _state(X0))


def euler_path(velocity: Velocity, X0: Latent, N: int) -> tuple[jax.Array, jax.Array]:
    """The road `euler` takes: the states Z_0 .. Z_N, [N+1,B,H,W,C], and the velocities used, [N,B,H,W,C]."""

    def step(Z, t):
        Z_next, v = _euler_step(velocity, Z, t, N)
        return Z_next, (Z_next, v)

    X0 = _state(X0)
    _, (Z, v) = lax.scan(step, X0, _times(N)[:-1])
    return jnp.concatenate([X0[None], Z]), v


def heun(velocity: Velocity, X0: Latent, N: int) -> Latent:
    """X1 by N steps of Heun's second-order method: 2N evaluations, the last of them at t = 1.

    A flow trained only on clocks above 0 is asked for clock 0 there; `euler` never does that.
    Raises as `euler`.
    """

    def step(Z, interval):
        t, t_next = interval
        Z_euler, v = _euler_step(velocity, Z, t, N)
        v_next = velocity(Z_euler, t_next).astype(Z.dtype)
        return Z + (v + v_next) / (2 * N), None

    t = _times(N)
    Z, _ = lax.scan(step, _state(X0), (t[:-1], t[1:]))
    return Z


def straightness(velocity: Velocity, X0: Latent, N: int) -> PerSample:
    """S = integral of E ||(Z1 - Z0) - v(Zt, t)||^2 dt along N Euler steps, per latent dimension; 0 iff straight.

    One value per sample, [B], so that callers can put an error bar on the mean. Z1 - Z0 is the mean of
    the velocities; subtracting it before squaring keeps S of a straight flow at zero in float32, where
    E[v^2] - E[v]^2 would leave its rounding error. Holds N velocities in memory. Raises as `euler`.
    """
    _, v = euler_path(velocity, X0, N)
    return jnp.mean((v - v.mean(0)) ** 2, axis=(0, 2, 3, 4))


def _euler_step(velocity, Z, t, N):
    v = velocity(Z, t).astype(Z.dtype)
    return Z + v / N, v


def _times(N):
    """t = 0, 1/N, .. 1, [N+1], divided in float64 so that each is the nearest float32."""
    if isinstance(N, bool) or not isinstance(N, (int, np.integer)) or N < 1:
        raise ValueError(f"N={N!r} is no number of solver steps: give a whole number of at least 1")
    return jnp.asarray(np.arange(N + 1) / N, jnp.float32)


def _state(X0):
    return X0.astype(jnp.promote_types(X0.dtype, jnp.float32))
