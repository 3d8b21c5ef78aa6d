"""Our inference at SD 1.5's size (or any other), with random weights."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import Call, peak_memory
from instaflow_jax import pipeline, sampling
from instaflow_jax.models.net import Net
from instaflow_jax.stages.plan.shapes import SD15_SCHEDULER, make_nets

ALPHA = 7.5


def ours(
    *,
    configs: dict[str, Any],
    flops: dict[str, float],
    latent: int,
    batches: list[int],
    steps: int,
    dtype: str,
    attention: str,
    kernels: str = "auto",
) -> dict[str, Call]:
    """The calls: each network, the one-step image at each batch, and the guided teacher's first steps.

    Args:
      configs: "unet", "vae" and "text_encoder", their config.json.
      flops: of a forward pass of each at batch 1.
      latent: height and width of the latents.
      steps: solver steps of the guided teacher.
      attention, kernels: see `configs/common.py`.
    """
    nets = make_nets(configs, dtype=jnp.dtype(dtype), attention=attention, kernels=kernels)
    params = {name: net.init(jax.random.key(0)) for name, net in nets.items()}
    params = jax.block_until_ready(jax.device_put(pipeline.inference_params(nets, params)))  # as the stages do
    rng = np.random.default_rng(0)
    calls = networks(nets, params, flops, latent, rng)
    for batch in batches:
        calls[f"one-step image, batch {batch}"] = image(nets, params, flops, latent, batch, rng)
    return calls | {f"{steps} guided teacher step{'s' * (steps > 1)}": teacher(nets, params, flops, latent, steps, rng)}


def networks(nets: dict[str, Net], params, flops: dict[str, float], latent: int, rng) -> dict[str, Call]:
    """One forward pass of each network at batch 1."""
    config = nets["unet"].config
    z = noise(rng, 1, latent, latent, config.in_channels)
    text = noise(rng, 1, tokens(nets), config.cross_attention_dim)
    encode, predict, decode = (
        jax.jit(nets["text_encoder"].apply),
        jax.jit(nets["unet"].apply),
        jax.jit(lambda p, z: nets["vae"].apply(p, z, method="decode")),
    )
    return {
        "CLIP text": call(lambda: encode(params["text_encoder"], ids(nets, 1)), flops["text_encoder"]),
        "UNet": call(lambda: predict(params["unet"], z, jnp.full((1,), 1000.0), text), flops["unet"]),
        "VAE decoder": call(lambda: decode(params["vae"], z), flops["vae"]),
    }


def image(nets: dict[str, Net], params, flops: dict[str, float], latent: int, batch: int, rng) -> Call:
    """Token ids to pixels in one Euler step, as the stage `sample` does it."""
    solve = sampling.make_solve(nets["unet"].apply, sampling.Flow(1, 1000), "euler", 1, 1.0)
    generate = jax.jit(sampling.make_generate(nets, solve))
    X0 = noise(rng, batch, latent, latent, nets["unet"].config.in_channels)
    cost = batch * sum(flops.values())
    return call(lambda: np.asarray(generate(params, ids(nets, batch), ids(nets, 1), X0)[0]), cost, batch)


def teacher(nets: dict[str, Net], params, flops: dict[str, float], latent: int, steps: int, rng) -> Call:
    """The first steps of DPM-Solver++(2M) with guidance; without text encoder and decoder."""
    dynamics = sampling.read_dynamics(SD15_SCHEDULER, {}, "teacher")
    solve = jax.jit(sampling.make_solve(nets["unet"].apply, dynamics, "dpm_solver", steps, ALPHA))
    X0 = noise(rng, 1, latent, latent, nets["unet"].config.in_channels)
    text, null = (noise(rng, 1, tokens(nets), nets["unet"].config.cross_attention_dim) for _ in range(2))
    return call(lambda: solve(params["unet"], X0, text, null), 2 * steps * flops["unet"])


def call(run, flops: float, count: int = 1) -> Call:
    return Call(lambda: jax.block_until_ready(run()), count, flops, memory)


def memory() -> int:
    """The device's peak since the start of the process if it counts (a GPU does), else the process's peak."""
    stats = jax.local_devices()[0].memory_stats()
    return stats["peak_bytes_in_use"] if stats else peak_memory()


def noise(rng: np.random.Generator, *shape: int) -> jax.Array:
    return jax.device_put(rng.standard_normal(shape, np.float32))


def tokens(nets: dict[str, Net]) -> int:
    return nets["text_encoder"].config.max_position_embeddings


def ids(nets: dict[str, Net], batch: int) -> np.ndarray:
    return np.ones((batch, tokens(nets)), np.int32)
