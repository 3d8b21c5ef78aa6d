"""What several stages measure of a model itself: the straightness of its paths, and the seconds of an image."""

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Array

from instaflow_jax import flow, sampling, solvers, teacher


def make_straightness(
    nets: Mapping[str, Any], dynamics: sampling.Dynamics, alpha: float, N: int
) -> Callable[..., Array]:
    """`program((params, null_ids), ids, X0) → S` [B] along N Euler steps; a teacher is seen as a flow."""

    def program(fixed, ids, X0):
        params, null_ids = fixed
        text, null = sampling.encode_text(nets, params, ids, null_ids)
        predict = flow.guided(functools.partial(nets["unet"].apply, params["unet"]), text, null, alpha)
        if isinstance(dynamics, sampling.Flow):
            table = sampling.solver_table(dynamics, "euler", N)
        else:
            predict, table = teacher.teacher_velocity(predict, dynamics), solvers.euler(N)
        return flow.straightness(solvers.trajectory(predict, table, X0)[1])

    return program


def median_seconds(program: Callable, inputs: tuple, repeats: int) -> float:
    """Seconds until the first output of `program(*inputs)` is on the host: the median of `repeats` runs.

    One run comes before them, because it may compile.
    """
    return float(np.median([_timed(program, inputs) for _ in range(repeats + 1)][1:]))


def _timed(program: Callable, inputs: tuple) -> float:
    began = time.perf_counter()
    np.asarray(program(*inputs)[0])
    return time.perf_counter() - began
