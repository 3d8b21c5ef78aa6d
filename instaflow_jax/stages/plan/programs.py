"""The very programs that the stages run, traced from shapes for devices that need not be there."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree
from ml_collections import ConfigDict

from instaflow_jax import pipeline, sampling
from instaflow_jax.data.pairs.reader import batch_shapes
from instaflow_jax.data.real_images.batches import beside
from instaflow_jax.infra import cost, devices
from instaflow_jax.infra.runner import BatchedRunner
from instaflow_jax.models.net import Net
from instaflow_jax.models.stacked_unet import StackedUNet, stack_net
from instaflow_jax.stages import distill, progressive, refine, reflow
from instaflow_jax.stages.common import adapters, fit, flow_training
from instaflow_jax.stages.common.loading import (
    latent_shape,
    network_options,
    read_solve_options,
    read_weight_options,
)
from instaflow_jax.stages.generate.job import make_latents_function
from instaflow_jax.stages.plan import shapes
from instaflow_jax.train import loop, lora
from instaflow_jax.train import state as train_state
from instaflow_jax.train.lora import BASE
from instaflow_jax.train.state import TrainState
from instaflow_jax.train.step import TrainStep


@dataclasses.dataclass(frozen=True)
class Program:
    """A program before it is compiled.

    Attributes:
      rows: images, pairs or samples of one call, on all devices together.
      calls: how often the stage runs it.
      unit: what a row is.
      flops: of one call on all devices together, without what is computed twice to save memory.
      sharded: full shapes of the arrays that FSDP splits.
      rounds: micro-batches of a call, those of all its updates together.
      sums: how often a call gathers weights and sums gradients over the devices.
    """

    traced: jax.stages.Traced
    rows: int
    calls: int
    unit: str
    flops: float
    sharded: tuple[tuple[int, ...], ...] = ()
    rounds: int = 1
    sums: int = 1


def check(config: ConfigDict, model: str) -> None:
    """Every check that needs no compiler. Raises ValueError, FileNotFoundError."""
    if config.stage in ("sample", "generate"):
        latent_shape(_nets(config, model), config.height, config.width)
        read_solve_options(config)
        if config.get("controls"):
            raise ValueError(f"config.program.controls={config.controls!r} is not planned; leave it empty")
    else:
        _nets(config, model)
        flow_training.read_flow_options(one_run(config))


def _nets(config: ConfigDict, model: str) -> dict[str, Net]:
    options = network_options(read_weight_options(config))
    nets = shapes.make_nets(shapes.read_configs(model), **options)
    if config.stage == "distill" and config.stacked.enabled and nets["unet"].module is not StackedUNet:
        nets["unet"] = stack_net(nets["unet"], config.stacked.middle_norm, **options)
    return nets


def trace(config: ConfigDict, model: str, targets: Sequence[jax.Device]) -> Program:
    """The program of the stage that `config` configures, with the shapes of `model`, for these devices.

    Raises:
      ValueError, FileNotFoundError: a field of the config or a file is wrong, or the devices cannot share the batch.
    """
    nets = _nets(config, model)
    if config.stage in ("sample", "generate"):
        return _inference(config, model, nets, targets)
    return _training(one_run(config), model, nets, devices.make_mesh(fsdp=config.fsdp, devices=targets))


def one_run(config: ConfigDict) -> ConfigDict:
    """The config of one training; of progressive distillation the first round, whose teacher is guided."""
    return progressive.configure(config, Path(), 0).config if config.stage == "progressive" else config


def _inference(config: ConfigDict, model: str, nets: Mapping[str, Net], targets: Sequence[jax.Device]) -> Program:
    options, unet = read_solve_options(config), nets["unet"]
    dynamics = sampling.read_dynamics(shapes.read_scheduler(model), {}, options.dynamics)
    solve = sampling.make_solve(unet.apply, dynamics, options.solver, options.N, options.alpha)
    names = ["text_encoder", "unet"]
    if config.stage == "generate":
        function, noise, count, unit = make_latents_function(nets, solve), jnp.float16, config.count, "pair"
    else:
        function, noise, count, unit = sampling.make_generate_rows(nets, solve), jnp.float32, 1, "image"
        names.append("vae")
    runner = BatchedRunner(function, config.batch, targets)
    latent, length = latent_shape(nets, options.height, options.width), _tokens(nets)
    weights = pipeline.inference_params(nets, {name: nets[name].shapes for name in names})
    fixed = weights, jax.ShapeDtypeStruct((1, length), jnp.int32)
    rows = (
        jax.ShapeDtypeStruct((runner.rows, length), jnp.int32),
        jax.ShapeDtypeStruct((runner.rows, *latent), noise),
    )
    traced = runner.trace(fixed, *rows)
    calls = max(1, math.ceil(count / runner.rows))
    return Program(traced, runner.rows, calls, unit, cost.count_flops(traced.jaxpr))


def _training(config: ConfigDict, model: str, nets: Mapping[str, Net], mesh: Mesh) -> Program:
    options = flow_training.read_flow_options(config)
    train = options.train
    devices.check_batch_size("config.program.batch_size", train.batch_size, mesh, train.accumulate)
    frozen = {
        "text_encoder": nets["text_encoder"].shapes,
        "null_ids": jax.ShapeDtypeStruct((1, _tokens(nets)), jnp.int32),
    }
    if config.stage == "distill" and config.distance == "lpips":
        frozen |= {name: nets[name].shapes for name in ("vae", "lpips")}
    if config.stage == "progressive":
        frozen["teacher"] = nets["unet"].cast(nets["unet"].shapes)
    if config.stage == "refine":
        frozen["real"] = nets["unet"].cast(nets["unet"].shapes)
    sharded = {}
    if options.lora:
        base = lora.freeze(nets["unet"], nets["unet"].shapes, lora.find_ranks(options.lora, nets["unet"].shapes))
        frozen |= {"real": base} if config.stage == "refine" else {}
        sharded = {BASE: devices.abstract(base, mesh)}
    init, create, step = _make_method(config, model, options, nets, mesh)
    state = devices.abstract(jax.eval_shape(create, init), mesh)
    recipe = {"latent_shape": latent_shape(nets, 0, 0), "tokens": _tokens(nets)}
    batch = batch_shapes(recipe, train.batch_size, np.dtype(np.float16))
    if config.stage == "refine" and refine.discriminates_images(config):
        batch = beside(batch)
    inputs = (
        devices.with_sharding(frozen, devices.replicated(mesh)) | sharded,
        devices.abstract_batch(batch, mesh),
        devices.with_sharding(jax.eval_shape(lambda: jax.random.key(0)), devices.replicated(mesh)),
    )
    traced = loop.trace_step(step, state, *inputs, mesh)
    flops = loop.count_flops(traced, step, state, *inputs)
    params = [*state.params.values(), *(state.fake.params.values() if config.stage == "refine" else ())]
    params += sharded.get(BASE, {}).values()
    split = tuple(p.shape for p in params if not p.sharding.is_fully_replicated)
    updates = config.fake.updates + 1 if config.stage == "refine" else 1
    rounds = train.accumulate * updates
    sums = updates if devices.gathers_once(state.params, sharded, mesh) else rounds
    return Program(traced, train.batch_size, train.loop["steps"], "sample", flops, split, rounds, sums)


def _make_method(
    config: ConfigDict, model: str, options: flow_training.FlowOptions, nets: Mapping[str, Net], mesh: Mesh
) -> tuple[PyTree, Callable[[PyTree], TrainState], TrainStep]:
    """Shapes of the initial parameters, how the state is made of them, and the step."""
    unet = adapters.shapes(options.lora, nets["unet"]) if options.lora else nets["unet"].shapes
    cast = adapters.make_cast(options.lora, nets["unet"])
    if config.stage == "refine":
        real = flow_training.FLOW
        if config.real:  # a teacher of this size
            real = sampling.read_dynamics(shapes.read_scheduler(model), {}, "teacher")
        convention = refine.make_convention(real)
        losses = refine.make_losses(config, options, nets, nets, convention, devices.platform(mesh))
        losses = refine.adapt(losses, options.lora.alpha) if options.lora else losses
        fake = refine.with_head(unet, losses.head and losses.head.shapes)
        return {"student": unet, "fake": fake}, *refine.make_method(config, options, losses, cast, mesh)
    if config.stage == "progressive":
        teacher = sampling.read_dynamics(shapes.read_scheduler(model), {}, "teacher")
        loss = progressive.make_loss(config, options, nets, teacher)
    elif config.stage == "reflow":
        scheduler = shapes.read_scheduler(model) if config.path == "sd" else {}
        loss = reflow.make_loss(config, options, nets, scheduler)
    else:
        loss = distill.make_loss(config, options, nets)
    loss = lora.adapt(loss, options.lora.alpha, BASE, {}) if options.lora else loss
    optimizer, step = fit.make_step(options.train, loss, mesh, cast, (BASE,) if options.lora else ())
    return unet, functools.partial(train_state.create, optimizer=optimizer), step


def _tokens(nets: Mapping[str, Net]) -> int:
    return nets["text_encoder"].config.max_position_embeddings


def pair_shapes(config: ConfigDict, model: str) -> tuple[tuple[int, int, int], int]:
    """The latents [h, w, c] of the pairs that a config makes, and the number of their prompts' tokens."""
    nets = _nets(config, model)
    return latent_shape(nets, config.height, config.width), _tokens(nets)


def fields(config: ConfigDict) -> dict[str, Any]:
    """The fields that decide memory and speed."""
    if config.stage in ("sample", "generate"):
        return {name: config[name] for name in ("dtype", "attention", "batch", "N", "alpha")}
    found = {name: config[name] for name in ("dtype", "attention", "batch_size", "accumulate", "fsdp")}
    found |= {} if config.lora.rank is None else {"lora.rank": config.lora.rank}
    return found | {f"remat.{name}": choice for name, choice in config.remat.items()}


def describe(config: ConfigDict) -> str:
    """The stage and these fields on one line."""
    return f"{config.stage} ({', '.join(f'{name}={value}' for name, value in fields(config).items())})"
