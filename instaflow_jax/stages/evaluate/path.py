"""A solver stopped on its way, as a table of numbers: where a picture is at time t, and what it is on the way to."""

from typing import NamedTuple

import numpy as np

from instaflow_jax import sampling
from instaflow_jax.solvers import Multistep
from instaflow_jax.stages.evaluate.models import Model


class Stop(NamedTuple):
    """Flow time t, after k whole steps; a flow's roads are straight in between."""

    t: float
    k: int


def stops(model: Model, N: int, count: int) -> list[Stop]:
    """`count` times from noise to data, evenly apart; for a teacher, the nearest between its N steps.

    A teacher is at t = alpha / (alpha + sigma), see `teacher.teacher_velocity`.
    """
    wanted = np.linspace(0, 1, count)
    if isinstance(model.dynamics, sampling.Flow):
        return [Stop(float(t), int(t * N + 1e-9)) for t in wanted]
    alpha, sigma = _levels(model, model.table(N))
    times = np.append(alpha / (alpha + sigma), 1.0)
    return [Stop(float(times[k]), int(k)) for k in (np.abs(times - t).argmin() for t in wanted)]


def on_the_way(model: Model, N: int, stop: Stop) -> Multistep:
    """N steps as far as the stop, giving Z_t, the flow's variable, whatever the solver computes in."""
    table, (t, k) = model.table(N), stop
    if isinstance(model.dynamics, sampling.Flow):
        return _with_last(table, k, 1.0, t - k / N) if k < N else table
    first = Multistep(*(row[:k] for row in table))
    if k in (0, N):
        return first
    alpha, sigma = (level[k] for level in _levels(model, table))
    scale = np.append(np.ones(k - 1), 1 / (alpha + sigma))  # Z = x / (alpha + sigma)
    return first._replace(a=first.a * scale, b=first.b * scale, c=first.c * scale)


def foreseen(model: Model, N: int, stop: Stop) -> Multistep:
    """The k steps before the stop, then one to the end: Z + (1 − t) v, or the teacher's own prediction of the data."""
    table = model.table(N)
    if stop.k == N:
        return table
    to_the_end = (1.0, 1 - stop.k / N) if isinstance(model.dynamics, sampling.Flow) else (0.0, 1.0)
    return _with_last(table, stop.k, *to_the_end)


def _with_last(table: Multistep, k: int, a: float, b: float) -> Multistep:
    """k steps, and x' = a x + b D for the next."""
    rows = Multistep(*(row[: k + 1].copy() for row in table))
    rows.a[k], rows.b[k], rows.c[k] = a, b, 0.0
    return rows


def _levels(model: Model, table: Multistep) -> tuple[np.ndarray, np.ndarray]:
    abar = model.dynamics.abar[table.tau]
    return np.sqrt(abar), np.sqrt(1 - abar)
