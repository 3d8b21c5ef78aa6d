"""Stage `refine`: a flow → a generator of one or a few steps, by matching the distribution of the data (DMD2)."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from instaflow_jax import pipeline, sampling
from instaflow_jax.arrays import Key
from instaflow_jax.data.pairs.reader import PairBatches, Pairs
from instaflow_jax.data.real_images.batches import BatchesBesideImages
from instaflow_jax.infra import devices
from instaflow_jax.infra.checkpoint import complete_steps, load_config
from instaflow_jax.infra.stores import CHECKPOINTS
from instaflow_jax.models.discriminator import make_discriminator
from instaflow_jax.models.net import Net
from instaflow_jax.models.unet import UNet2DConditionModel
from instaflow_jax.stages import reflow
from instaflow_jax.stages.common import adapters, fit, flow_training, loading, real_images
from instaflow_jax.stages.common.adapters import Trained
from instaflow_jax.stages.generate.stage import check_pairs, has_pairs, made_by, need_pairs
from instaflow_jax.train import lora, optim, score_distillation
from instaflow_jax.train import state as train_state
from instaflow_jax.train.batches import Batches
from instaflow_jax.train.lora import BASE
from instaflow_jax.train.score_distillation import HEAD, Convention, Method
from instaflow_jax.train.step import Loss
from instaflow_jax.train.two_time_scale import make_two_time_scale_step
from instaflow_jax.weights.conventions import NUM_TIMESTEPS


class Losses(NamedTuple):
    """What trains the two networks.

    Attributes:
      student, fake: the losses.
      head: the discriminator; None without adversarial losses.
    """

    student: Loss
    fake: Loss
    head: Net | None


def run(config: ConfigDict, workdir: str) -> None:
    """Trains in `workdir`/`config.output`, from the flow `config.model`, on the prompts and X1 of the pairs.

    First makes what is missing: the flow (if `config.model` is ""), by `reflow` with `config.reflow`, the real score
    (if `config.real` is ""), by `reflow` with `config.score`, and the pairs in `workdir`/`config.pairs_folder`. With
    `config.images` the discriminator's real images are these, and the score is theirs.

    Raises:
      ValueError, FileNotFoundError: a field of the config, one of the two flows, or the pairs are wrong.
      OSError, FloatingPointError: see `train.loop`.
    """
    options, directory = read_options(config, workdir), Path(workdir) / config.output
    if not has_data(config, workdir):
        check(config, workdir)
    if lacks_flow(config, workdir):
        reflow.need(config.reflow, workdir)
    pairs = need_pairs(pairs_config(config, workdir), Path(workdir) / config.pairs_folder)
    real = load_real(config.real or reflow.need(config.score, workdir), options)
    pipe = load_student(options, real)
    convention, recipe = make_convention(flow_training.start_dynamics(real)), pairs.manifest["recipe"]
    losses = make_losses(config, options, pipe.nets, real.nets, convention, jax.default_backend())
    for each in (pipe, real):
        flow_training.check_fit(each, recipe)
    trained = prepare(options, directory, pipe, real, losses)
    evaluate = flow_training.make_evaluate(options.eval, pipe, tuple(recipe["latent_shape"]))
    state = fit.train_by(
        functools.partial(make_method, config, options, trained.loss, trained.cast),
        trained.options,
        directory,
        init=trained.init,
        frozen=trained.frozen,
        batches=make_batches(config, Path(workdir), options, pipe, pairs),
        evaluate=lambda ema, path: evaluate(trained.complete(ema), path),
    )
    fit.export_ema(state, lambda ema: flow_training.export(pipe, trained.complete(ema), directory / loading.EXPORT))


def check(config: ConfigDict, workdir: str) -> None:
    """Every check of `run` and of the stages that it would run first, without training or writing anything.

    Raises:
      ValueError, FileNotFoundError: see `run`.
    """
    options = read_options(config, workdir)
    if config.real or reflow.is_trained(config.score, workdir):
        real = load_real(options.train.config["real"], options)
        dynamics = flow_training.start_dynamics(real)
    else:  # what the score will start from
        real, dynamics = reflow.check(config.score, workdir), flow_training.FLOW
    flow = reflow.check(config.reflow, workdir) if lacks_flow(config, workdir) else None  # a stand-in
    recipe = check_pairs(pairs_config(config, workdir), Path(workdir) / config.pairs_folder, flow)
    if flow and not config.model:
        pipe = flow
        check_text_encoder(pipe, real, config.reflow.model)
    else:
        pipe = load_student(options, real)
    shows_images = discriminates_images(config)
    if shows_images:
        job = real_images.read_job(config.images, options.weights, pipe, recipe["latent_shape"])
        real_images.check(job, Path(workdir))
    params = real.nets["unet"].shapes
    losses = make_losses(config, options, pipe.nets, real.nets, make_convention(dynamics), jax.default_backend())
    flow_training.check_fit(real, recipe)
    if options.lora:
        lora.find_ranks(options.lora, params)
    optim.make_schedule(**config.fake.schedule)
    fake, frozen = with_head(params, losses.head and losses.head.shapes), {"real": params}
    flow_training.check(options, pipe, recipe, losses.student, {**frozen, "fake": fake})
    frozen = flow_training.with_text(pipe, {**frozen, "student": pipe.nets["unet"].shapes})
    flow_training.check_loss(options, recipe, losses.fake, fake, frozen, images=shows_images)


def read_options(config: ConfigDict, workdir: str) -> flow_training.FlowOptions:
    """Checks and unpacks the config before anything is loaded; the resolved one names the two models to start from.

    Raises:
      ValueError: naming the field, its value and the rule.
    """
    chosen = [name for name in ("model", "real") if not config[name]]
    resolved = config.copy_and_resolve_references().unlock()
    resolved.model = config.model or reflow.export_directory(config.reflow, workdir)
    resolved.real = config.real or reflow.export_directory(config.score, workdir)
    options, t = flow_training.read_flow_options(resolved.lock()), tuple(config.t)
    if len(t) != 2 or not t[0] < t[1]:
        raise ValueError(f"config.t={t} must be two times, the smaller one first, as in (0.02, 0.98)")
    if bool(config.adversarial) != bool(config.fake.adversarial):
        raise ValueError(
            f"config.adversarial={config.adversarial:g} and config.fake.adversarial={config.fake.adversarial:g} must "
            "both be 0, which turns the discriminator off, or neither"
        )
    fit.check_same_run(options.train, Path(workdir) / config.output, chosen)
    check_images(config, workdir)
    return options


def has_data(config: ConfigDict, workdir: str) -> bool:
    """Whether the flow, the score and all data are there."""
    score = bool(config.real) or reflow.is_trained(config.score, workdir)
    images = not discriminates_images(config) or real_images.has_images(Path(workdir))
    return score and images and has_pairs(Path(workdir) / config.pairs_folder) and not lacks_flow(config, workdir)


def lacks_flow(config: ConfigDict, workdir: str) -> bool:
    """Whether the workdir's flow, which is to be refined or to make the pairs, is missing."""
    needed = not config.model or not (config.pairs.model or has_pairs(Path(workdir) / config.pairs_folder))
    return needed and not reflow.is_trained(config.reflow, workdir)


def pairs_config(config: ConfigDict, workdir: str) -> ConfigDict:
    """`config.pairs`, made by the workdir's flow unless it names another model."""
    return made_by(config.pairs, config.pairs.model or reflow.export_directory(config.reflow, workdir))


# ---------------------------------------------------------------- the real images


def discriminates_images(config: ConfigDict) -> bool:
    """Whether the discriminator's real images are those of `config.images`."""
    return bool(config.images.source and config.adversarial)


def check_images(config: ConfigDict, workdir: str) -> None:
    """Raises ValueError if nothing would use `config.images`, or the workdir's score was trained on other images."""
    source, score = config.images.source, Path(workdir) / config.score.output
    if config.real:
        if source and not config.adversarial:
            raise ValueError(
                f"config.images.source={source!r} has no effect with config.real={config.real!r} and without "
                "config.adversarial: the score and the discriminator are what would use it; use config.real='' to "
                "train a score"
            )
        return
    if not reflow.is_trained(config.score, workdir) or not complete_steps(score / CHECKPOINTS):
        return
    images = load_config(score / CHECKPOINTS, step=None).get("images", {"source": "", "share": 0.0})
    there, here = (block["source"] if block["share"] else "" for block in (images, config.score.images))
    if there != here:
        raise ValueError(
            f"{score} was trained with images.source={there!r}, not {here!r}: delete it to train it again, or "
            f"use it as it is with --config.real={score / loading.EXPORT}"
        )


def make_batches(
    config: ConfigDict,
    workdir: Path,
    options: flow_training.FlowOptions,
    pipe: pipeline.Pipeline,
    pairs: Pairs,
) -> Batches:
    """The pairs, with real images beside them where the discriminator sees those. Raises as `real_images.need`."""
    order = {"batch_size": options.train.batch_size, "seed": options.train.seed}
    if not discriminates_images(config):
        return PairBatches(pairs, **order)
    shape = pairs.manifest["recipe"]["latent_shape"]
    job = real_images.read_job(config.images, options.weights, pipe, shape)
    return BatchesBesideImages(pairs, real_images.need(job, workdir), **order)


# ---------------------------------------------------------------- the models


def load_real(source: str, options: flow_training.FlowOptions) -> pipeline.Pipeline:
    """The real score.

    Raises:
      ValueError, FileNotFoundError: it cannot be read, or is a flow of another sign or other timesteps.
    """
    pipe = loading.load(source, dataclasses.replace(options.weights, delta=None, loras=(), weights_variant=""))
    flow_training.start_dynamics(pipe)
    return pipe


def load_student(options: flow_training.FlowOptions, real: pipeline.Pipeline) -> pipeline.Pipeline:
    """The model to refine. Raises ValueError, FileNotFoundError; also if its text encoder is not the real score's."""
    source = options.train.config["model"]
    pipe = loading.load(source, options.weights)
    check_text_encoder(pipe, real, source)
    return pipe


def check_text_encoder(pipe: pipeline.Pipeline, real: pipeline.Pipeline, source: str) -> None:
    """Raises ValueError if the text encoder of the model `source` is not the real score's."""
    texts = [each.params["text_encoder"] for each in (pipe, real)]
    if texts[0].keys() != texts[1].keys() or not all(np.array_equal(p, texts[1][name]) for name, p in texts[0].items()):
        raise ValueError(
            f"{source} has another text encoder than the real score: refine it with a score that was trained from "
            "the same teacher (config.score.model, or config.real)"
        )


def prepare(
    options: flow_training.FlowOptions,
    directory: Path,
    pipe: pipeline.Pipeline,
    real: pipeline.Pipeline,
    losses: Losses,
) -> Trained:
    """What a run in `directory` trains: all weights of both networks, or adapters of both.

    Raises:
      ValueError: a pattern of `config.lora` matches no layer, or the run in `directory` is of other models.
    """
    net, score = pipe.nets["unet"], real.nets["unet"]
    cast = adapters.make_cast(options.lora, net, score)
    if options.lora is None:
        frozen = flow_training.with_text(pipe, {"real": score.cast(real.params["unet"])})
        return Trained(
            options.train,
            initial_params(pipe, real, losses.head, options),
            losses,
            frozen,
            (),
            lambda params: params,
            cast,
        )
    start, alpha = flow_training.initial_params(pipe, options.warm_start), options.lora.alpha
    ranks, score_ranks = (lora.find_ranks(options.lora, each.shapes) for each in (net, score))
    base = devices.shard(lora.freeze(net, start, ranks), devices.make_mesh(fsdp=options.train.fsdp))
    frozen = {"real": lora.freeze(score, real.params["unet"], score_ranks), BASE: base}

    def init(key: Key) -> dict[str, Mapping[str, Any]]:
        student_key, fake_key, head_key = jax.random.split(key, 3)
        fake = lora.init(fake_key, score_ranks, score.shapes)
        head = losses.head.init(head_key) if losses.head else None
        return {"student": lora.init(student_key, ranks, net.shapes), "fake": with_head(fake, head)}

    weights = {BASE: pipe.params["unet"], "real": real.params["unet"]}
    return Trained(
        adapters.with_base(options.train, directory, options.train.config["model"], weights),
        init,
        adapt(losses, alpha),
        flow_training.with_text(pipe, frozen),
        (BASE,),
        functools.partial(lora.merge, start, alpha=alpha),
        cast,
    )


def adapt(losses: Losses, alpha: float) -> Losses:
    """The losses of adapters: the student's belong to frozen["base"], the fake score's to frozen["real"]."""
    return Losses(
        lora.adapt(losses.student, alpha, BASE, {"fake": "real"}),
        lora.adapt(losses.fake, alpha, "real", {"student": BASE}),
        losses.head,
    )


def initial_params(
    pipe: pipeline.Pipeline, real: pipeline.Pipeline, head: Net | None, options: flow_training.FlowOptions
) -> dict[str, Mapping[str, Any]]:
    """The student's weights, and the fake score's: the real score's and a new head."""
    new = jax.device_get(head.init(jax.random.key(options.train.seed))) if head else None
    student = flow_training.initial_params(pipe, options.warm_start)
    return {"student": student, "fake": with_head(real.params["unet"], new)}


def with_head(params: Mapping[str, Any], head: Mapping[str, Any] | None) -> dict[str, Any]:
    """The fake score's parameters, or their shapes, with those of its head."""
    return {**params, **{HEAD + name: value for name, value in (head or {}).items()}}


# ---------------------------------------------------------------- the losses and the step


def make_convention(dynamics: sampling.Dynamics) -> Convention:
    """How the real score predicts."""
    if isinstance(dynamics, sampling.Flow):
        return score_distillation.flow_convention(dynamics.num_timesteps)
    return score_distillation.teacher_convention(dynamics)


def make_losses(
    config: ConfigDict,
    options: flow_training.FlowOptions,
    nets: Mapping[str, Net],
    real_nets: Mapping[str, Net],
    convention: Convention,
    platform: str,
) -> Losses:
    """The losses of the student and of the fake score.

    Args:
      nets: the student's.
      real_nets, convention: the real score's.
      platform: on which they run: cpu, gpu or tpu.

    Raises:
      ValueError: the real score's network cannot be a discriminator.
    """
    student, score = (each["unet"].with_remat(options.remat["unet"]) for each in (nets, real_nets))
    if config.adversarial and score.module is not UNet2DConditionModel:
        raise ValueError(
            f"config.adversarial={config.adversarial:g} needs a U-Net as real score, not {score.module.__name__}: "
            "use config.adversarial=0 and config.fake.adversarial=0, or another real score"
        )
    head = make_discriminator(score) if config.adversarial else None
    method = Method(
        student,
        score,
        nets["text_encoder"],
        head,
        convention=convention,
        alpha=config.alpha,
        steps=tuple(config.N),
        t=tuple(config.t),
        prompt_dropout=options.prompt_dropout,
        num_timesteps=NUM_TIMESTEPS,
        unroll=platform == "cpu",  # where convolutions in a loop are slow
    )
    weights = {name: config[name] for name in ("matching", "regression", "adversarial")}
    return Losses(
        score_distillation.make_student_loss(method, **weights),
        score_distillation.make_fake_loss(method, adversarial=config.fake.adversarial),
        head,
    )


def make_method(
    config: ConfigDict, options: flow_training.FlowOptions, losses: Losses, cast: devices.Cast, mesh: Mesh
) -> fit.Method:
    """How `fit.train_by` creates the state of both networks, and the step that trains them."""
    train = options.train
    optimizer, fake_optimizer = (
        optim.make_optimizer(optim.make_schedule(**schedule), **train.optim)
        for schedule in (train.schedule, config.fake.schedule)
    )
    step = make_two_time_scale_step(
        losses.student,
        losses.fake,
        optimizer,
        fake_optimizer,
        mesh,
        ema_decay=train.ema_decay,
        accumulate=train.accumulate,
        updates=config.fake.updates,
        first=config.fake.first,
        unroll=devices.platform(mesh) == "cpu",  # where convolutions in a loop are slow
        sharded=(BASE,) if options.lora else (),
        cast=cast,
    )
    create: Any = functools.partial(train_state.create_two, optimizer=optimizer, fake_optimizer=fake_optimizer)
    return create, step
