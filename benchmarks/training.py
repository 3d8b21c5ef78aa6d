"""Our training: the steps of reflow and of LPIPS distillation, the full-size gradient, and pair generation."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.sd15 import call
from benchmarks.timing import Call, step_title
from configs import distill, generate, reflow
from instaflow_jax import pipeline
from instaflow_jax.arrays import Batch
from instaflow_jax.infra import devices as parallel
from instaflow_jax.models.clip import CLIPTextModel
from instaflow_jax.models.unet import UNet2DConditionModel
from instaflow_jax.stages.common.flow_training import read_flow_options
from instaflow_jax.stages.distill import load_loss
from instaflow_jax.stages.distill import make_loss as make_distill_loss
from instaflow_jax.stages.generate.job import compile_program
from instaflow_jax.stages.generate.stage import read_job
from instaflow_jax.stages.plan.shapes import make_nets
from instaflow_jax.stages.reflow import make_loss as make_reflow_loss
from instaflow_jax.train import loop, losses, optim, state, step
from instaflow_jax.weights.conventions import NUM_TIMESTEPS


def pairs(batch: int, latent: Sequence[int], length: int, vocabulary: int = 2000) -> Batch:
    """Random pairs, the same for both sides: float32 latents [batch, *latent] and token ids [batch, length]."""
    rng = np.random.default_rng(0)
    X0, X1 = rng.standard_normal((2, batch, *latent), np.float32)
    return {"X0": X0, "X1": X1, "ids": rng.integers(1, vocabulary, (batch, length)).astype(np.int32)}


def embedded(*, batch: int, devices: int) -> dict[str, Call]:
    """The steps that configs/reflow.py and configs/distill.py (by LPIPS) run on the embedded model.

    Args:
      batch: size on all devices together.
      devices: number of CPU devices.
    """
    jax.config.update("jax_num_cpu_devices", devices)
    pipe = pipeline.load("openmoji", variant=None, attention="xla")
    config = distill.get_config("lpips")
    lpips_loss, seen = load_loss(config, read_flow_options(config), pipe)
    frozen = seen | {"text_encoder": pipe.params["text_encoder"], "null_ids": pipe.tokenizer([""])}
    recipe = reflow.get_config()
    step_losses = {
        "reflow step": make_reflow_loss(recipe, read_flow_options(recipe), pipe.nets),
        "LPIPS step": lpips_loss,
    }
    data = pairs(batch, pipe.latent_shape, pipe.tokenizer.model_max_length)
    return {
        f"{name}, embedded, batch {batch}": training(loss, recipe, pipe.params["unet"], frozen, data)
        for name, loss in step_losses.items()
    }


def training(loss, config, params, frozen, data: Batch) -> Call:
    """Steps of `train.loop`'s own program, each from the state that the previous one returned."""
    mesh = parallel.make_mesh(fsdp=1)
    optimizer = optim.make_optimizer(optim.make_schedule(**config.schedule), **config.optim)
    update = step.make_train_step(loss, optimizer, mesh, ema_decay=config.ema_decay, accumulate=1)
    now = parallel.shard(state.create(params, optimizer), mesh)
    inputs = (
        parallel.replicate(frozen, mesh),
        parallel.global_batch(data, mesh),
        parallel.replicate_key(jax.random.key(0), mesh),
    )
    traced = loop.trace_step(update, now, *inputs, mesh)
    flops = loop.count_flops(traced, update, now, *inputs)
    compiled, held = [], [now]

    def run():
        if not compiled:
            compiled.append(traced.lower().compile())
        held[0], metrics = compiled[0](held[0], *inputs)
        return metrics

    return call(run, flops, len(data["X0"]))


def full(
    *,
    configs: dict[str, Any],
    loss: str,
    latent: int,
    batch: int,
    dtype: str,
    attention: str,
    remat: str,
    crop: int,
    margin: int,
) -> dict[str, Call]:
    """The step of configs/reflow.py:sd15 ("reflow") or distill.py:sd15_lpips ("LPIPS") on networks of random weights.

    Args:
      configs: "unet", "vae", "text_encoder" and "lpips", their config.json.
      latent: height and width of the latents.
      remat: of every network that has a gradient.
      crop, margin: latents per side that LPIPS compares, and around it.
    """
    make, recipe = {
        "reflow": (make_reflow_loss, reflow.get_config("sd15")),
        "LPIPS": (make_distill_loss, distill.get_config("sd15_lpips")),
    }[loss]
    recipe.unlock().remat.update(dict.fromkeys(recipe.remat, remat))
    if loss == "LPIPS":
        recipe.lpips.update({"crop": crop, "margin": margin})
    nets = make_nets(configs, dtype=jnp.dtype(dtype), attention=attention)
    function = make(recipe, read_flow_options(recipe), nets)
    names, length = ("text_encoder", "vae", "lpips"), nets["text_encoder"].config.max_position_embeddings
    frozen = {name: nets[name].init(jax.random.key(1)) for name in (names if loss == "LPIPS" else names[:1])}
    frozen["null_ids"] = np.ones((1, length), np.int32)
    shape = (latent, latent, nets["unet"].config.in_channels)
    data = pairs(batch, shape, length, nets["text_encoder"].config.vocab_size)
    params = nets["unet"].init(jax.random.key(0))
    return {step_title(loss, remat, batch): training(function, recipe, params, frozen, data)}


def gradient(
    *, configs: dict[str, Any], latent: int, batch: int, dtype: str, attention: str, remat: str
) -> dict[str, Call]:
    """Loss and gradient of reflow at full size; a complete step's state would not fit beside the peer's."""
    options = {"dtype": jnp.dtype(dtype), "attention": attention}
    unet = UNet2DConditionModel.from_config(configs["unet"], **options).with_remat(remat)
    text = CLIPTextModel.from_config(configs["text_encoder"], **options)
    loss = losses.make_reflow_loss(
        unet, text, prompt_dropout=0.1, num_timesteps=NUM_TIMESTEPS, time="uniform", penalty="squared", noise="paired"
    )
    params, length = unet.init(jax.random.key(0)), text.config.max_position_embeddings
    frozen = {"text_encoder": text.init(jax.random.key(1)), "null_ids": np.ones((1, length), np.int32)}
    data = pairs(batch, (latent, latent, unet.config.in_channels), length)
    function = step.make_gradient(loss)
    compute, flops = jax.jit(function), loop.model_flops(function, params, frozen, data, jax.random.key(2))
    return {
        f"reflow gradient, {latent}×{latent} latents, batch {batch}": call(
            lambda: compute(params, frozen, data, jax.random.key(2)), flops, batch
        )
    }


def generation(*, batch: int, devices: int) -> dict[str, Call]:
    """One call of the program of configs/generate.py: guided DPM-Solver++(2M), 25 steps, latents only."""
    jax.config.update("jax_num_cpu_devices", devices)
    config = generate.get_config().unlock()
    config.batch, config.count = batch // devices, batch
    job = read_job(config)
    runner, fixed, _ = compile_program(job, config.batch)
    data = pairs(batch, job.recipe["latent_shape"], job.recipe["tokens"])
    X0 = data["X0"].astype(np.float16)
    return {f"{batch} pairs, embedded": call(lambda: runner.start(fixed, data["ids"], X0), 0.0, batch)}
