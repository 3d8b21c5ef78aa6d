"""The cost of pairs: FLOPs and bytes of one, hours and gigabytes of all, from a few calls on the local devices."""

import time

import jax
import jax.numpy as jnp

from instaflow_jax.data.pairs import manifest as pairs_manifest
from instaflow_jax.data.pairs import store as pairs_store
from instaflow_jax.infra.cost import peak_flops, step_flops
from instaflow_jax.infra.runner import BatchedRunner
from instaflow_jax.stages.generate.job import Fixed, Job, compile_program

_CALLS = 3
_RECORD_OVERHEAD = 66  # bytes that ArrayRecord adds to a record
_BLOCK = 2**16  # ArrayRecord files consist of blocks of this size; the last one holds the index


def run(job: Job, *, batch: int, devices: int) -> None:
    """Prints the cost of `job` on the local devices and on `devices` such devices, with `batch` pairs per call each."""
    runner, fixed, _ = compile_program(job, batch)
    flops, size, rate = flops_per_pair(job, batch), bytes_per_pair(job), pairs_per_second(job, runner, fixed)
    local, recipe = jax.local_devices(), job.recipe
    peak = peak_flops(local[0].device_kind)
    share = f", {100 * rate * flops / (peak * len(local)):.1f} % of the bf16 peak" if peak else ""
    print(
        f"{flops / 1e12:.4g} TFLOP and {size:,} bytes per pair: {recipe['N']} steps of {recipe['solver']}, "
        f"alpha {recipe['alpha']:g}, latents {recipe['latent_shape']}\n"
        f"measured on {len(local)} × {local[0].device_kind}, {batch} pairs per device and call: "
        f"{rate:.4g} pairs/s, {rate * flops / 1e12:.4g} TFLOP/s{share}"
    )
    for number in sorted({len(local), devices}):
        hours = recipe["count"] / (rate / len(local) * number) / 3600
        disk = bytes_on_disk(job, size) / 1e9
        print(f"{recipe['count']:,} pairs on {number} such devices: {hours:.4g} hours, {disk:.4g} GB")


def flops_per_pair(job: Job, batch: int) -> float:
    """FLOPs by XLA's cost analysis.

    The analysis counts the body of the solver's loop once, so the result is text + N (all − text).
    """
    recipe = job.recipe
    params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), job.pipe.params)
    null_ids, ids = (jax.ShapeDtypeStruct((rows, recipe["tokens"]), jnp.int32) for rows in (1, batch))
    X0 = jax.ShapeDtypeStruct((batch, *recipe["latent_shape"]), jnp.float16)
    encode = job.pipe.nets["text_encoder"].apply
    text = step_flops(jax.jit(encode).lower(params["text_encoder"], ids), 1)
    total = step_flops(jax.jit(job.make_latents).lower((params, null_ids), ids, X0), 1)
    return (text + recipe["N"] * (total - text)) / batch


def bytes_on_disk(job: Job, size: int) -> int:
    """Bytes of all shards, each padded to full blocks, if a pair takes `size` bytes."""
    shards = (pairs_manifest.shard_range(job.recipe, s) for s in range(pairs_manifest.shard_count(job.recipe)))
    return sum((-(-len(shard) * size // _BLOCK) + 1) * _BLOCK for shard in shards)


def bytes_per_pair(job: Job) -> int:
    """Bytes of the first pair in a shard."""
    X0 = job.noise([0])[0]
    fields = {"prompt": job.prompt(0), "ids": job.ids([0])[0], "seed": 0, "X0": X0, "X1": X0}
    return len(pairs_store.serialize(pairs_store.make_features(job.recipe), job.recipe, **fields)) + _RECORD_OVERHEAD


def pairs_per_second(job: Job, runner: BatchedRunner, fixed: Fixed) -> float:
    """Rate of the program alone: the fastest of a few calls, after one for warm-up."""
    ids, X0 = job.ids(range(runner.rows)), job.noise(range(runner.rows))
    seconds = []
    for _ in range(_CALLS + 1):
        start = time.perf_counter()
        jax.block_until_ready(runner.start(fixed, ids, X0))
        seconds.append(time.perf_counter() - start)
    return runner.rows / min(seconds[1:])
