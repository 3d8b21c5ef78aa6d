"""What pairs would cost: FLOPs and bytes of one, hours and gigabytes of all, by a few calls on the devices present."""

import time

import jax
import jax.numpy as jnp

from instaflow_jax.data.pairs import manifest as pairs_manifest
from instaflow_jax.data.pairs import store as pairs_store
from instaflow_jax.infra.cost import peak_flops, step_flops
from instaflow_jax.stages.generate.job import Job, tokens
from instaflow_jax.stages.generate.program import Sampler, draw_noise

_CALLS = 3
# ArrayRecord's: bytes around a record, and the blocks that a file is made of, the last for the index.
_FRAME, _BLOCK = 66, 2**16


def run(job: Job) -> None:
    """Prints the plan of `job`, for the devices present and for `config.plan_devices` of their kind."""
    sampler = Sampler(job)
    flops, size, rate = flops_per_pair(job), bytes_per_pair(job), pairs_per_second(job, sampler)
    devices, count = jax.local_devices(), job.recipe["count"]
    print(
        f"{flops / 1e12:.4g} TFLOP and {size:,} bytes a pair: {job.recipe['N']} steps of {job.recipe['solver']}, "
        f"alpha {job.recipe['alpha']:g}, latents {job.recipe['latent_shape']}"
    )
    print(
        f"measured on {len(devices)} × {devices[0].device_kind}, {job.config.batch} pairs a device and call: "
        f"{rate:.4g} pairs/s, {rate * flops / 1e12:.4g} TFLOP/s{utilisation(rate * flops, devices)}"
    )
    for number in sorted({len(devices), job.config.plan_devices}):
        hours = count / (rate / len(devices) * number) / 3600
        print(f"{count:,} pairs on {number} such devices: {hours:.4g} hours, {bytes_on_disk(job, size) / 1e9:.4g} GB")


def utilisation(flops: float, devices: list[jax.Device]) -> str:
    """The share of the devices' peak, where that is known."""
    peak = peak_flops(devices[0].device_kind)
    return "" if peak is None else f", {100 * flops / (peak * len(devices)):.1f} % of the bf16 peak"


def flops_per_pair(job: Job) -> float:
    """By XLA's cost analysis, which counts the body of the solver's loop once: text + N (all − text)."""
    recipe, batch = job.recipe, job.config.batch
    params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), job.pipe.params)
    null = jax.ShapeDtypeStruct((1, recipe["tokens"]), jnp.int32)
    ids = jax.ShapeDtypeStruct((batch, recipe["tokens"]), jnp.int32)
    X0 = jax.ShapeDtypeStruct((batch, *recipe["latent_shape"]), jnp.float16)
    encode = job.pipe.nets["text_encoder"].apply
    text = step_flops(jax.jit(encode).lower(params["text_encoder"], ids), 1)
    whole = step_flops(jax.jit(job.rows).lower(params, null, ids, X0), 1)
    return (text + recipe["N"] * (whole - text)) / batch


def bytes_on_disk(job: Job, size: int) -> int:
    """All shards, each filled up to whole blocks."""
    shards = (pairs_manifest.shard_range(job.recipe, s) for s in range(pairs_manifest.shard_count(job.recipe)))
    return sum((-(-len(shard) * size // _BLOCK) + 1) * _BLOCK for shard in shards)


def bytes_per_pair(job: Job) -> int:
    """What the first pair takes in a shard."""
    X0 = draw_noise(job, [0])[0]
    record = pairs_store.serialize(
        pairs_store.make_features(job.recipe),
        job.recipe,
        prompt=job.texts[0],
        ids=tokens(job, [0])[0],
        seed=0,
        X0=X0,
        X1=X0,
    )
    return len(record) + _FRAME


def pairs_per_second(job: Job, sampler: Sampler) -> float:
    """Of the program alone, the best of a few calls after a first one."""
    ids = tokens(job, range(sampler.rows))
    X0 = draw_noise(job, range(sampler.rows))
    seconds = []
    for _ in range(_CALLS + 1):
        began = time.perf_counter()
        jax.block_until_ready(sampler(ids, X0))
        seconds.append(time.perf_counter() - began)
    return sampler.rows / min(seconds[1:])
