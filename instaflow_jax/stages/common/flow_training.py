"""What `reflow` and `distill` share: pairs made on demand, the grid one looks at, and the flow written out at the end."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from instaflow_jax import flow, pipeline, sampling, solvers
from instaflow_jax.arrays import Params
from instaflow_jax.data.pairs.reader import PairBatches, Pairs
from instaflow_jax.infra import devices, images
from instaflow_jax.models.layers import REMAT
from instaflow_jax.stages.common import fit as training
from instaflow_jax.stages.common.loading import read_weight_options
from instaflow_jax.stages.generate import stage as generate
from instaflow_jax.train import warm_start
from instaflow_jax.train.step import Loss

EXPORT = "export"  # the trained flow, in diffusers layout
NUM_TIMESTEPS = 1000  # what the clock of every flow trained here counts at noise


def check(config: ConfigDict) -> None:
    """Cross-field checks, before anything is loaded.

    Raises:
      ValueError: naming field, value and rule.
    """
    read_weight_options(config)
    if not 0 <= config.prompt_dropout <= 1:
        raise ValueError(f"config.prompt_dropout={config.prompt_dropout} must be a share of prompts in [0, 1]")
    for name, kind in config.remat.items():
        if kind not in REMAT:
            raise ValueError(f"config.remat.{name}={kind!r} is not one of {', '.join(REMAT)}")
    if config.eval_every < 1:
        raise ValueError(f"config.eval_every={config.eval_every} must be 1 or more steps")


def need_pairs(config: ConfigDict, directory: Path) -> Pairs:
    """The pairs in `directory`/pairs, made first (or finished) if they are not all there."""
    try:
        pairs = Pairs(directory / generate.DIRECTORY)
    except FileNotFoundError as error:
        print(f"{error}\n→ generating pairs into {directory / generate.DIRECTORY}", flush=True)
        generate.run(config, str(directory))
        devices.barrier("pairs")
        pairs = Pairs(directory / generate.DIRECTORY)
    recipe = pairs.manifest["recipe"]
    print(f"{len(pairs)} pairs by {recipe['solver']}, N={recipe['N']}, alpha={recipe['alpha']:g}", flush=True)
    return pairs


def fit(
    config: ConfigDict, directory: Path, pipe: pipeline.Pipeline, pairs: Pairs, loss: Loss, frozen: dict[str, Params]
) -> Path:
    """Trains the UNet of `pipe` on the pairs and writes the flow to `directory`/export, whose path it returns."""
    shape, tokens = tuple(pairs.manifest["recipe"]["latent_shape"]), pairs.manifest["recipe"]["tokens"]
    if shape[-1] != pipe.nets["unet"].config.in_channels or tokens != pipe.tokenizer.model_max_length:
        raise ValueError(
            f"the pairs hold latents {shape} and prompts of {tokens} tokens, but the model takes "
            f"{pipe.nets['unet'].config.in_channels} channels and {pipe.tokenizer.model_max_length} tokens: "
            "they were made by another teacher"
        )
    frozen = frozen | {"text_encoder": pipe.params["text_encoder"], "null_ids": pipe.tokenizer([""])}
    state = training.train(
        config,
        directory,
        start=start_from(config, pipe),
        loss=loss,
        frozen=frozen,
        batches=PairBatches(pairs, batch_size=config.batch_size, seed=config.seed),
        watch=make_watch(config, pipe, shape),
    )
    ema = devices.to_host(state.ema)  # every process gathers, the first writes
    if jax.process_index() == 0:
        export(pipe, ema, directory / EXPORT)
    devices.barrier("export")
    return directory / EXPORT


def start_from(config: ConfigDict, pipe: pipeline.Pipeline) -> Params:
    """The UNet's weights to start from; a teacher's are given a flow's sign and clock where the config asks for it.

    Raises:
      ValueError: a flow of another sign or clock than this trains.
    """
    dynamics = sampling.read_dynamics(pipe.scheduler, pipe.index, "auto")
    if isinstance(dynamics, sampling.Flow) and dynamics != sampling.Flow(1, NUM_TIMESTEPS):
        raise ValueError(
            f"the flow to start from predicts {dynamics.factor:g} of X1 − X0 by timesteps from {dynamics.num_timesteps}, but "
            f"the sign here is +1 and the clock {NUM_TIMESTEPS}: write it anew with configs/export.py, "
            "--config.formats=\"('diffusers',)\" --config.convention=released"
        )
    if isinstance(dynamics, sampling.Flow) or not config.warm_start:
        return pipe.params["unet"]
    print("the teacher's weights are given a flow's sign and clock (config.warm_start)", flush=True)
    return warm_start.from_teacher(pipe.params["unet"], pipe.nets["unet"], dynamics, NUM_TIMESTEPS)


def export(pipe: pipeline.Pipeline, unet: Params, directory: Path) -> None:
    """The pipeline with the flow in place of its UNet; its class is the released code's, which says "flow" to `sample`."""
    flow_pipe = dataclasses.replace(
        pipe, params=pipe.params | {"unet": unet}, index=pipe.index | {"_class_name": "RectifiedFlowPipeline"}
    )
    pipeline.save(flow_pipe, directory)
    print(f"wrote the flow to {directory}", flush=True)


def make_watch(config: ConfigDict, pipe: pipeline.Pipeline, shape: tuple[int, int, int]) -> training.Watch:
    """A grid of fixed prompts and noise, a column for each number of steps and seed, and the flow's straightness S."""
    prompts, counts, seeds = list(config.eval.prompts), tuple(config.eval.N), config.eval.seeds
    ids, null = jnp.asarray(np.repeat(pipe.tokenizer(prompts), seeds, 0)), jnp.asarray(pipe.tokenizer([""]))
    X0 = sampling.noise(np.tile(np.arange(seeds), len(prompts)), shape)
    tables = [(solvers.pad(solvers.euler(n), max(counts)), n) for n in counts]
    draw = jax.jit(make_draw(pipe, config.eval.alpha))
    straightness = jax.jit(make_straightness(pipe, max(counts)))

    def watch(ema: Params, path: Path) -> dict[str, float]:
        params = pipe.params | {"unet": ema}
        pictures = np.stack(
            [np.asarray(draw(params, ids, null, X0, *table)) for table in tables]
        )  # [steps, prompts · seeds, …]
        rows = pictures.reshape(len(counts), len(prompts), seeds, *pictures.shape[2:]).swapaxes(0, 1)
        grid = images.grid(
            rows.reshape(-1, *pictures.shape[2:]),
            columns=len(counts) * seeds,
            row_labels=prompts,
            column_labels=[f"N={n}" if i == 0 else "" for n in counts for i in range(seeds)],
            scale=max(1, 64 // pictures.shape[3]),
        )
        images.save_png(path, grid, {"prompts": "|".join(prompts), "alpha": str(config.eval.alpha)})
        return {"straightness": float(np.mean(straightness(params, ids, X0)))}

    return watch


def make_draw(pipe: pipeline.Pipeline, alpha: float) -> Callable:
    """`draw(params, ids, null_ids, X0, table, N) → uint8` images of the flow, one program for every N."""

    def draw(params, ids, null_ids, X0, table, N):
        def solve(unet, X0, text, null):
            def network(Z, tau, context):
                return pipe.nets["unet"].apply(unet, Z, tau, context)

            return solvers.integrate(flow.flow_velocity(network, text, null, alpha, NUM_TIMESTEPS), table, X0, N)

        return sampling.make_generate(pipe.nets, solve)(params, ids, null_ids, X0)

    return draw


def make_straightness(pipe: pipeline.Pipeline, N: int) -> Callable:
    """`straightness(params, ids, X0) → S` [B] of the unguided flow along N Euler steps, per latent dimension."""

    def straightness(params, ids, X0):
        text = pipe.nets["text_encoder"].apply(params["text_encoder"], ids).last_hidden_state

        def network(Z, tau, context):
            return pipe.nets["unet"].apply(params["unet"], Z, tau, context)

        _, v = solvers.trajectory(flow.flow_velocity(network, text, text, 1.0, NUM_TIMESTEPS), solvers.euler(N), X0)
        return flow.straightness(v)

    return straightness
