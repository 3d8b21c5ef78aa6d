"""The compiled programs of `evaluate`: few, because compiling one takes as long as making fifty images.

A solver's table, its length and the guidance are arguments. So one program runs the teacher and the flows at any number
of steps, and a second one runs models without guidance.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from instaflow_jax import flow, sampling, solvers
from instaflow_jax.arrays import AnyArray, Latent, PerSample, TokenIds
from instaflow_jax.infra.runner import BatchedRunner
from instaflow_jax.solvers import Multistep
from instaflow_jax.stages.common.loading import check_drawn, name_image
from instaflow_jax.stages.common.model_measures import make_straightness, median_seconds
from instaflow_jax.stages.evaluate.models import Model

Solver = tuple[Multistep, Int[AnyArray, ""], Float[AnyArray, ""]]  # a padded table, its number of rows, alpha
Images = UInt8[np.ndarray, "B height width 3"]  # H and W are the latents'


def make_solver(table: Multistep, alpha: float, longest: int) -> Solver:
    """A table padded to `longest` rows, its number of rows, and alpha. Raises ValueError if the table is longer."""
    return solvers.pad(table, longest), np.array(len(table.tau), np.int32), np.array(alpha, np.float32)


def make_solve(apply: Callable, solver: Solver, guided: bool) -> sampling.Solve:
    """`solve(params, X0, text, null) → X1`; alpha is unused unless `guided`."""
    table, N, alpha = solver

    def solve(params, X0, text, null):
        network = functools.partial(apply, params)
        predict = flow.always_guided(network, text, null, alpha) if guided else flow.guided(network, text, null, 1.0)
        return solvers.integrate(predict, table, X0, N)

    return solve


def make_draw_one(nets: Mapping[str, Any], guided: bool) -> Callable[..., tuple[Array, Array]]:
    """`program(params, null_ids, solver, ids, X0) → (images, finite)`, as a user would run it."""

    def program(params, null_ids, solver, ids, X0):
        solve = make_solve(nets["unet"].apply, solver, guided)
        return sampling.make_generate(nets, solve)(params, ids, null_ids, X0)

    return program


def make_draw(nets: Mapping[str, Any], guided: bool) -> Callable[..., tuple[Array, Array, Array]]:
    """`program((params, null_ids, solver), ids, X0) → (latents, images, finite)`."""

    def program(fixed, ids, X0):
        params, null_ids, solver = fixed
        text, null = sampling.encode_text(nets, params, ids, null_ids)
        X1 = make_solve(nets["unet"].apply, solver, guided)(params["unet"], X0, text, null)
        return X1, *sampling.to_uint8_checked(nets["vae"].apply(params["vae"], X1, method="decode"))

    return program


class Programs:
    """Runs models on every device of this process, `per_device` rows each a call.

    Args:
      nets: of one architecture; the weights come with each model.
      null_ids: [1, L], the empty prompt.
      longest: steps of the longest solver.
    """

    def __init__(self, nets: Mapping[str, Any], null_ids: TokenIds, *, per_device: int, longest: int):
        self._nets, self._null, self._per_device, self._longest = nets, null_ids, per_device, longest
        self._draw = {guided: BatchedRunner(make_draw(nets, guided), per_device) for guided in (False, True)}
        self._draw_one = {guided: jax.jit(make_draw_one(nets, guided)) for guided in (False, True)}
        self._straightness: dict[tuple, BatchedRunner] = {}

    def draw(self, model: Model, table: Multistep, alpha: float, ids: TokenIds, X0: Latent) -> tuple[Latent, Images]:
        """Latents and images. Raises ValueError naming the prompt of an image that is NaN or infinite."""
        runner = self._draw[alpha > 1]
        fixed = runner.place((model.pipe.params, self._null, make_solver(table, alpha, self._longest)))
        latents, drawn, finite = runner(fixed, ids, X0)
        check_drawn(finite, name_rows(model, ids))
        return latents, drawn

    def straightness(self, model: Model, alpha: float, N: int, ids: TokenIds, X0: Latent) -> PerSample:
        """S of each sample, per latent dimension, along N Euler steps."""
        key = model.dynamics, alpha, N
        if key not in self._straightness:
            self._straightness[key] = BatchedRunner(make_straightness(self._nets, *key), self._per_device)
        runner = self._straightness[key]
        return runner(runner.place((model.pipe.params, self._null)), ids, X0)

    def draw_one(self, model: Model, table: Multistep, alpha: float, ids: TokenIds, X0: Latent) -> Images:
        """One image, by the program that `seconds` times."""
        drawn, finite = self._draw_one[alpha > 1](*self._inputs(model, table, alpha, ids, X0))
        check_drawn(np.asarray(finite), name_rows(model, ids))
        return np.asarray(drawn)

    def seconds(self, model: Model, table: Multistep, alpha: float, ids: TokenIds, X0: Latent, repeats: int) -> float:
        """Seconds from token ids and noise to one image in bytes: the median of `repeats` runs."""
        return median_seconds(self._draw_one[alpha > 1], self._inputs(model, table, alpha, ids, X0), repeats)

    def _inputs(self, model: Model, table: Multistep, alpha: float, ids: TokenIds, X0: Latent):
        return jax.device_put((model.pipe.params, self._null, make_solver(table, alpha, self._longest), ids, X0))


def name_rows(model: Model, ids: TokenIds) -> list[str]:
    """The model and the prompt of each row, from its token ids."""
    word = {number: token for token, number in model.pipe.tokenizer.vocab.items()}
    marks = (model.pipe.tokenizer.bos_id, model.pipe.tokenizer.eos_id, model.pipe.tokenizer.pad_id)
    prompts = ("".join(word.get(int(i), "?") for i in row if i not in marks).replace("</w>", " ") for row in ids)
    return [name_image(prompt.strip(), f"of row {i} of {model.name}") for i, prompt in enumerate(prompts)]
