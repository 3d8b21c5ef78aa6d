"""A solver stopped on its way, as a table: where an image is at time t, and where its velocity points."""

from typing import NamedTuple

import numpy as np

from instaflow_jax import sampling, solvers
from instaflow_jax.solvers import Multistep
from instaflow_jax.stages.evaluate.models import Model
from instaflow_jax.teacher import alpha_sigma


class Stop(NamedTuple):
    """Flow time t, after k complete steps; between two steps a flow's path is a straight line."""

    t: float
    k: int


def stops(model: Model, N: int, count: int) -> list[Stop]:
    """`count` evenly spaced times from noise to data; for a teacher, the nearest ones between its N steps.

    A teacher is at t = alpha / (alpha + sigma), see `teacher.teacher_velocity`.
    """
    wanted = np.linspace(0, 1, count)
    if isinstance(model.dynamics, sampling.Flow):
        return [Stop(float(t), int(t * N + 1e-9)) for t in wanted]
    alpha, sigma = _levels(model, model.table(N))
    times = np.append(alpha / (alpha + sigma), 1.0)
    return [Stop(float(times[k]), int(k)) for k in (np.abs(times - t).argmin() for t in wanted)]


def until(model: Model, N: int, stop: Stop) -> Multistep:
    """N steps as far as the stop. The result is Z_t, the flow's variable, whatever variable the solver works in."""
    table, (t, k) = model.table(N), stop
    if isinstance(model.dynamics, sampling.Flow):
        return solvers.cut(table, k, 1.0, t - k / N) if k < N else table
    first = Multistep(*(field[:k] for field in table))
    if k in (0, N):
        return first
    alpha, sigma = (level[k] for level in _levels(model, table))
    scale = np.append(np.ones(k - 1), 1 / (alpha + sigma))  # Z = x / (alpha + sigma)
    return first._replace(a=first.a * scale, b=first.b * scale, c=first.c * scale)


def endpoint(model: Model, N: int, stop: Stop) -> Multistep:
    """The k steps before the stop, then one step to the end: Z + (1 − t) v, or the teacher's prediction of the data."""
    table = model.table(N)
    if stop.k == N:
        return table
    a, b = (1.0, 1 - stop.k / N) if isinstance(model.dynamics, sampling.Flow) else (0.0, 1.0)
    return solvers.cut(table, stop.k, a, b)


def _levels(model: Model, table: Multistep) -> tuple[np.ndarray, np.ndarray]:
    return alpha_sigma(model.dynamics.abar[table.tau])
