"""What the stages that train a flow share: options, the initial weights, the evaluation, and the exported flow."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from ml_collections import ConfigDict

from instaflow_jax import flow, pipeline, sampling, solvers, teacher
from instaflow_jax.arrays import Params
from instaflow_jax.data.pairs.manifest import holds
from instaflow_jax.data.pairs.reader import PairBatches, Pairs, batch_shapes
from instaflow_jax.data.real_images.batches import MixedBatches, Share, beside
from instaflow_jax.infra import files, images
from instaflow_jax.infra.epochs import ShuffledEpochs
from instaflow_jax.models.layers import REMAT
from instaflow_jax.stages.common import adapters, fit
from instaflow_jax.stages.common.loading import (
    EXPORT,
    WeightOptions,
    check_drawn,
    check_finite,
    name_image,
    read_weight_options,
)
from instaflow_jax.stages.common.model_measures import make_straightness
from instaflow_jax.train import warm_start
from instaflow_jax.train.batches import Batches
from instaflow_jax.train.lora import Lora, find_ranks
from instaflow_jax.train.step import Loss
from instaflow_jax.weights.conventions import NUM_TIMESTEPS

FLOW = sampling.Flow(1, NUM_TIMESTEPS)


# ---------------------------------------------------------------- the config


@dataclasses.dataclass(frozen=True)
class NetworkOptions:
    """The fields of `configs/reflow.py:network`.

    Attributes:
      remat: for each network, what the backward pass recomputes; one of `REMAT`.
      prompt_dropout: share of prompts replaced by the empty one.
    """

    weights: WeightOptions
    train: fit.TrainOptions
    eval: fit.EvalOptions
    remat: Mapping[str, str]
    prompt_dropout: float


@dataclasses.dataclass(frozen=True)
class FlowOptions(NetworkOptions):
    """The fields of `configs/reflow.py:training`.

    Attributes:
      warm_start: whether a teacher's weights are converted to a flow's sign and timesteps before the first step.
      lora: the adapters that are trained in place of all weights; None to train all.
    """

    warm_start: bool
    lora: Lora | None


def read_network_options(config: ConfigDict) -> NetworkOptions:
    """Checks and unpacks the config before anything is loaded.

    Raises:
      ValueError: naming the field, its value and the rule.
    """
    return NetworkOptions(
        weights=read_weight_options(config),
        train=fit.read_train_options(config),
        eval=fit.read_eval_options(config.eval),
        remat=read_remat(config.remat),
        prompt_dropout=config.prompt_dropout,
    )


def read_flow_options(config: ConfigDict) -> FlowOptions:
    """As `read_network_options`, for a stage that trains a flow. Raises ValueError."""
    options = read_network_options(config)
    return FlowOptions(**vars(options), warm_start=config.warm_start, lora=adapters.read_lora(config.lora))


def read_remat(config: ConfigDict) -> dict[str, str]:
    """The block `config.remat`, a choice for each network. Raises ValueError naming the choices."""
    for name, choice in config.items():
        if choice not in REMAT:
            raise ValueError(f"config.remat.{name}={choice!r} is not one of {', '.join(REMAT)}")
    return config.to_dict()


# ---------------------------------------------------------------- checks before the first long computation


def check(
    options: FlowOptions, pipe: pipeline.Pipeline, recipe: Mapping[str, Any], loss: Loss, frozen: Mapping[str, Any]
) -> None:
    """Every check of `train_flow` that needs no pairs; traces the loss, but computes nothing.

    Args:
      recipe: of the pairs, which may not exist yet, or of the real images that are trained on alone.
      loss, frozen: see `train_flow`.

    Raises:
      ValueError: the pairs, the weights to start from, the devices, or a field of the config do not fit.
    """
    check_fit(pipe, recipe)
    start_dynamics(pipe)
    if options.lora:
        find_ranks(options.lora, pipe.nets["unet"].shapes)
    train = options.train
    fit.check(train)
    if holds(recipe) == "pairs":  # there may be fewer real images than a batch takes
        ShuffledEpochs(recipe["count"], batch_size=train.batch_size, seed=train.seed)
    check_loss(options, recipe, loss, pipe.nets["unet"].shapes, with_text(pipe, frozen))


def check_loss(
    options: NetworkOptions,
    recipe: Mapping[str, Any],
    loss: Loss,
    params: PyTree,
    frozen: Mapping[str, Any],
    *,
    images: bool = False,
) -> None:
    """Traces a loss of these parameters, arrays or shapes, on pairs of this recipe. Raises as the loss does.

    Args:
      images: whether as many real images stand beside the pairs.
    """
    train = options.train
    batch = batch_shapes(recipe, train.batch_size // train.accumulate, np.dtype(np.float16))
    batch = beside(batch) if images else batch
    jax.eval_shape(loss, params, frozen, batch, jax.random.key(0))


def check_fit(pipe: pipeline.Pipeline, recipe: Mapping[str, Any]) -> None:
    """Raises ValueError if pairs of this recipe do not have the latents and prompts that the model takes."""
    net, length, shape = pipe.nets["unet"], pipe.tokenizer.model_max_length, tuple(recipe["latent_shape"])
    if shape[-1] != net.config.in_channels or recipe["tokens"] != length:
        raise ValueError(
            f"the {holds(recipe)} hold latents {shape} and prompts of {recipe['tokens']} tokens, but the model takes "
            f"{net.config.in_channels} channels and {length} tokens: they were made by another teacher; "
            "use its config.model or another workdir"
        )


def with_text(pipe: pipeline.Pipeline, frozen: Mapping[str, Any]) -> dict[str, Any]:
    """`frozen`, the text encoder's weights and the empty prompt."""
    return {**frozen, "text_encoder": pipe.params["text_encoder"], "null_ids": pipe.tokenizer([""])}


# ---------------------------------------------------------------- training


def train_flow(
    options: FlowOptions,
    directory: Path,
    pipe: pipeline.Pipeline,
    pairs: Pairs | None,
    loss: Loss,
    frozen: Mapping[str, Any],
    dynamics: sampling.Dynamics = FLOW,
    *,
    source: str,
    share: Share | None = None,
) -> None:
    """Trains the UNet of `pipe`, or its adapters, in `directory` on the pairs; writes the flow to `directory`/export.

    Args:
      pairs: None to train on real images alone.
      frozen: inputs of the loss that are not trained, besides the text encoder's weights and the empty prompt.
      dynamics: of the trained network: a teacher's schedule if it keeps the teacher's head.
      source: where `pipe` was loaded from.
      share: real images that take a share of each batch.

    Raises:
      ValueError: the pairs or the weights to start from do not fit (see `initial_params`).
      OSError, FloatingPointError: see `train.loop`.
    """
    batches, recipes = make_batches(options.train, pairs, share)
    for recipe in recipes:
        check_fit(pipe, recipe)
    shape = tuple(recipes[0]["latent_shape"])
    start = initial_params(pipe, options.warm_start and dynamics == FLOW)
    trained = adapters.prepare(
        options.train, options.lora, directory, source, pipe, start, loss, with_text(pipe, frozen)
    )
    evaluate = make_evaluate(options.eval, pipe, shape, dynamics)
    state = fit.train(
        trained.options,
        directory,
        init=trained.init,
        loss=trained.loss,
        frozen=trained.frozen,
        batches=batches,
        evaluate=lambda ema, path: evaluate(trained.complete(ema), path),
        cast=trained.cast,
        sharded=trained.sharded,
    )
    fit.export_ema(state, lambda ema: export(pipe, trained.complete(ema), directory / EXPORT, dynamics))


def make_batches(
    options: fit.TrainOptions, pairs: Pairs | None, share: Share | None
) -> tuple[Batches, list[Mapping[str, Any]]]:
    """The batches of pairs, of real images or of both, and the recipes of what they hold."""
    order = {"batch_size": options.batch_size, "seed": options.seed}
    if share is None:
        return PairBatches(pairs, **order), [pairs.manifest["recipe"]]
    sources = [source for source in (pairs, share.images) if source is not None]
    return MixedBatches(pairs, share, **order), [source.manifest["recipe"] for source in sources]


def initial_params(pipe: pipeline.Pipeline, warm_start_teacher: bool) -> Params:
    """The UNet's weights to start from, a teacher's optionally converted to a flow's sign and timesteps.

    Raises:
      ValueError: `pipe` is a flow with a sign or timesteps that are not trained here.
    """
    dynamics, params = start_dynamics(pipe), pipe.params["unet"]
    if isinstance(dynamics, sampling.Flow) or not warm_start_teacher:
        return params
    print("converting the teacher's weights to a flow's sign and timesteps (config.warm_start)", flush=True)
    return warm_start.from_teacher(params, pipe.nets["unet"], dynamics, NUM_TIMESTEPS)


def start_dynamics(pipe: pipeline.Pipeline) -> sampling.Dynamics:
    """The dynamics of the model to start from. Raises ValueError for a flow of another sign or other timesteps."""
    dynamics = sampling.read_dynamics(pipe.scheduler, pipe.index, "auto")
    if isinstance(dynamics, sampling.Flow) and dynamics != FLOW:
        raise ValueError(
            f"the flow to start from predicts {dynamics.factor:g} of X1 − X0 with timesteps from "
            f"{dynamics.num_timesteps}, but training needs the sign +1 and timesteps from {NUM_TIMESTEPS}: convert "
            "it with configs/export.py, --config.formats=\"('diffusers',)\" --config.convention=released"
        )
    return dynamics


def as_flow(pipe: pipeline.Pipeline, unet: Params) -> pipeline.Pipeline:
    """The pipeline with a flow as its UNet, under the released code's class name, which marks it as a flow."""
    params, index = pipe.params | {"unet": unet}, pipe.index | {"_class_name": "RectifiedFlowPipeline"}
    return dataclasses.replace(pipe, params=params, index=index)


def as_straight_teacher(pipe: pipeline.Pipeline, unet: Params) -> pipeline.Pipeline:
    """The pipeline with a noise predictor of straight paths as its UNet, to be sampled by few steps of DDIM."""
    params, index = pipe.params | {"unet": unet}, pipe.index | {"scheduler": ["diffusers", "DDIMScheduler"]}
    return dataclasses.replace(pipe, params=params, index=index, scheduler=straight_scheduler(pipe.scheduler))


def straight_scheduler(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """The scheduler_config.json of DDIM with this noise schedule, whose steps go from pure noise to the data itself."""
    kept = {name: scheduler[name] for name in teacher.NOISE_FIELDS if name in scheduler}
    head = {"prediction_type": teacher.read_schedule(scheduler).prediction_type}
    steps = {"_class_name": "DDIMScheduler", "timestep_spacing": "trailing", "set_alpha_to_one": True}
    return kept | head | steps | teacher.PIPELINE


def export(pipe: pipeline.Pipeline, unet: Params, directory: Path, dynamics: sampling.Dynamics = FLOW) -> None:
    """Writes the pipeline with the trained `unet`, see `as_flow` and `as_straight_teacher`.

    Raises:
      ValueError: a weight is NaN or infinite.
    """
    check_finite(f"the flow for {directory}", unet)
    trained = as_flow if dynamics == FLOW else as_straight_teacher
    with files.renew_checksums(directory):
        pipeline.save(trained(pipe, unet), directory)
    print(f"wrote the flow to {directory}", flush=True)


# ---------------------------------------------------------------- evaluation


def make_evaluate(
    options: fit.EvalOptions,
    pipe: pipeline.Pipeline,
    shape: tuple[int, int, int],
    dynamics: sampling.Dynamics = FLOW,
) -> fit.Evaluate:
    """A grid from fixed prompts and noise, one column for each N and seed, and the flow's straightness S.

    What it returns raises ValueError naming prompt and seed of an image that is NaN or infinite.
    """
    prompts, counts, seeds = list(options.prompts), tuple(options.N), options.seeds
    ids, null_ids = jnp.asarray(np.repeat(pipe.tokenizer(prompts), seeds, 0)), jnp.asarray(pipe.tokenizer([""]))
    X0 = sampling.noise(np.tile(np.arange(seeds), len(prompts)), shape)
    solver = "euler" if dynamics == FLOW else "ddim"
    tables = [(solvers.pad(sampling.solver_table(dynamics, solver, N), max(counts)), N) for N in counts]
    draw = jax.jit(make_draw(pipe, options.alpha))
    straightness = jax.jit(make_straightness(pipe.nets, dynamics, 1.0, max(counts)))
    labels = [f"N={N}" if seed == 0 else "" for N in counts for seed in range(seeds)]
    names = [name_image(prompt, seed) for prompt in prompts for seed in range(seeds)]

    def evaluate(ema: Params, path: Path) -> dict[str, float]:
        params = pipe.params | {"unet": ema}
        columns = []
        for table in tables:
            drawn, finite = draw(params, ids, null_ids, X0, *table)
            check_drawn(np.asarray(finite), names)
            columns.append(drawn)
        drawn = np.stack(columns)  # [counts, prompts · seeds, …]
        size = drawn.shape[2:]
        rows = drawn.reshape(len(counts), len(prompts), seeds, *size).swapaxes(0, 1).reshape(-1, *size)
        scale = max(1, 64 // size[1])
        grid = images.grid(rows, columns=len(labels), row_labels=prompts, column_labels=labels, scale=scale)
        images.save_png(path, grid, {"prompts": "|".join(prompts), "alpha": str(options.alpha)})
        return {"straightness": float(np.mean(straightness((params, null_ids), ids, X0)))}

    return evaluate


def make_draw(pipe: pipeline.Pipeline, alpha: float) -> Callable:
    """`draw(params, ids, null_ids, X0, table, N)`; padded tables let one program serve every N. See `make_generate`."""

    def draw(params, ids, null_ids, X0, table, N):
        def solve(unet, X0, text, null):
            network = functools.partial(pipe.nets["unet"].apply, unet)
            return solvers.integrate(flow.guided(network, text, null, alpha), table, X0, N)

        return sampling.make_generate(pipe.nets, solve)(params, ids, null_ids, X0)

    return draw
