"""The compiled programs of `evaluate`: few, since compiling one costs as much as drawing fifty pictures.

Every solver here is a table of numbers (`teacher.Multistep`), and a table, its length and the guidance are arguments.
So one program serves teacher and flows at any number of steps, and another one the models without guidance.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, UInt8

from instaflow_jax import flow, sampling, solvers, teacher
from instaflow_jax.arrays import Context, Latent, Network, Params, TokenIds, Velocity
from instaflow_jax.infra import images
from instaflow_jax.solvers import Multistep
from instaflow_jax.stages.evaluate.models import Model

Solver = tuple[Multistep, Int[Array, ""], Float[Array, ""]]  # a table of any length, its rows that count, alpha


def make_solver(table: Multistep, alpha: float, longest: int) -> Solver:
    """What the programs take: the table filled up to `longest` rows, their number, and alpha.

    Raises:
      ValueError: the table has more rows.
    """
    N = len(table.tau)
    if longest < N:
        raise ValueError(f"a solver of {N} steps does not fit into tables of {longest}")
    rows = [np.pad(np.asarray(row, np.float32), (0, longest - N)) for row in table]
    return Multistep(*rows), np.int32(N), np.float32(alpha)


def make_solve(apply: Callable, solver: Solver, guided: bool) -> sampling.Solve:
    """`solve(params, X0, text, null) → X1`; unless `guided`, alpha is not looked at."""
    table, N, alpha = solver

    def solve(params: Params, X0: Latent, text: Context, null: Context) -> Latent:
        def network(Z, tau, context):
            return apply(params, Z, tau, context)

        predict = flow.always_guided(network, text, null, alpha) if guided else flow.guided(network, text, null, 1.0)
        return solvers.integrate(predict, table, X0, N)

    return solve


def make_draw_one(nets: Mapping[str, Any], guided: bool) -> Callable:
    """`program(params, null_ids, solver, ids, X0) → pictures`, the way a user draws."""

    def program(params, null_ids, solver, ids, X0):
        solve = make_solve(nets["unet"].apply, solver, guided)
        return sampling.make_generate(nets, solve)(params, ids, null_ids, X0)

    return program


def make_draw(nets: Mapping[str, Any], guided: bool) -> Callable:
    """`program((params, null_ids, solver), ids, X0) → (latents, pictures)`."""

    def program(fixed, ids, X0):
        params, null_ids, solver = fixed
        text, null = sampling.encode_text(nets, params, ids, null_ids)
        X1 = make_solve(nets["unet"].apply, solver, guided)(params["unet"], X0, text, null)
        return X1, images.to_uint8(nets["vae"].apply(params["vae"], X1, method="decode"))

    return program


def make_straightness(nets: Mapping[str, Any], dynamics: sampling.Dynamics, alpha: float, N: int) -> Callable:
    """`program((params, null_ids), ids, X0) → S` [B]."""

    def program(fixed, ids, X0):
        params, null_ids = fixed
        text, null = sampling.encode_text(nets, params, ids, null_ids)

        def network(Z, tau, context):
            return nets["unet"].apply(params["unet"], Z, tau, context)

        _, v = solvers.trajectory(make_velocity(dynamics, network, text, null, alpha), solvers.euler(N), X0)
        return flow.straightness(v)

    return program


def make_velocity(
    dynamics: sampling.Dynamics, network: Network, text: Context, null: Context, alpha: float
) -> Velocity:
    """The guided velocity of a flow, or of a teacher seen as one."""
    if not isinstance(dynamics, sampling.Flow):
        return teacher.teacher_velocity(flow.guided(network, text, null, alpha), dynamics)

    def signed(Z, tau, context):
        return dynamics.factor * network(Z, tau, context)

    return flow.flow_velocity(signed, text, null, alpha, dynamics.num_timesteps)


class Programs:
    """Draws on every device of this process, `per_device` rows each a call.

    Args:
      nets: of the teacher; the weights come with each model.
      null_ids: [1, L], the empty prompt.
      longest: steps of the longest solver.
    """

    def __init__(self, nets: Mapping[str, Any], null_ids: TokenIds, *, per_device: int, longest: int):
        self._nets, self._null, self._longest = nets, null_ids, longest
        devices = jax.local_devices()
        self._mesh = jax.make_mesh((len(devices),), ("data",), devices=devices, axis_types=(AxisType.Auto,))
        self._rows = per_device * len(devices)
        self._draw = {guided: self._on_all(make_draw(nets, guided)) for guided in (False, True)}
        self._draw_one = {guided: jax.jit(make_draw_one(nets, guided)) for guided in (False, True)}
        self._straightness: dict[tuple, Callable] = {}

    def draw(
        self,
        model: Model,
        table: Multistep,
        alpha: float,
        ids: Int[np.ndarray, "N L"],
        X0: Float[np.ndarray, "N h w c"],
    ) -> tuple[Float[np.ndarray, "N h w c"], UInt8[np.ndarray, "N H W 3"]]:
        """Latents and pictures."""
        fixed = model.pipe.params, self._null, make_solver(table, alpha, self._longest)
        return self._spread(self._draw[alpha > 1], fixed, ids, X0)

    def straightness(
        self, model: Model, alpha: float, N: int, ids: Int[np.ndarray, "N L"], X0: Float[np.ndarray, "N h w c"]
    ) -> Float[np.ndarray, " N"]:
        """S of each sample, per latent dimension, along N Euler steps; a teacher is seen as a flow."""
        kind = model.dynamics, alpha, N
        if kind not in self._straightness:
            self._straightness[kind] = self._on_all(make_straightness(self._nets, *kind))
        return self._spread(self._straightness[kind], (model.pipe.params, self._null), ids, X0)

    def draw_one(
        self,
        model: Model,
        table: Multistep,
        alpha: float,
        ids: Int[np.ndarray, "1 L"],
        X0: Float[np.ndarray, "1 h w c"],
    ) -> UInt8[np.ndarray, "1 H W 3"]:
        """One picture by the program that `seconds` times."""
        return np.asarray(self._draw_one[alpha > 1](*self._inputs(model, table, alpha, ids, X0)))

    def seconds(
        self,
        model: Model,
        table: Multistep,
        alpha: float,
        ids: Int[np.ndarray, "1 L"],
        X0: Float[np.ndarray, "1 h w c"],
        repeats: int,
    ) -> float:
        """From token ids and noise to one picture in bytes: the median of `repeats` runs of one compiled program."""
        program, inputs = self._draw_one[alpha > 1], self._inputs(model, table, alpha, ids, X0)
        return float(np.median([_timed(program, inputs) for _ in range(repeats + 1)][1:]))  # the first one may compile

    def _inputs(self, model, table, alpha, ids, X0):
        return jax.device_put((model.pipe.params, self._null, make_solver(table, alpha, self._longest), ids, X0))

    def _on_all(self, program: Callable) -> Callable:
        """Each device runs the same program on rows of its own."""
        whole, split = PartitionSpec(), PartitionSpec("data")
        return jax.jit(
            jax.shard_map(program, mesh=self._mesh, in_specs=(whole, split, split), out_specs=split, check_vma=False)
        )

    def _spread(self, program: Callable, fixed: Any, *arrays: np.ndarray) -> Any:
        """The results of all rows; the last call is filled up, and the filling cut off."""
        whole, split = (NamedSharding(self._mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
        fixed, count = jax.device_put(fixed, whole), len(arrays[0])
        outputs = []
        for start in range(0, count, self._rows):
            rows = [np.resize(array[start : start + self._rows], (self._rows, *array.shape[1:])) for array in arrays]
            outputs.append(program(fixed, *jax.device_put(rows, split)))
        return jax.tree.map(lambda *parts: np.concatenate([np.asarray(part) for part in parts])[:count], *outputs)


def _timed(program: Callable, inputs: tuple) -> float:
    began = time.perf_counter()
    np.asarray(program(*inputs))
    return time.perf_counter() - began
