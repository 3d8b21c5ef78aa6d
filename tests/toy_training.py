"""A small training run for the tests of the loop; also a script, for the tests that kill it.

The script trains in a workdir, writes metrics and checkpoints, then result.npz; `start` runs it.
"""

import contextlib
import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from instaflow_jax.infra import checkpoint, devices, metrics
from instaflow_jax.train import batches, loop, optim, state, step

WIDTH = 128  # wide enough that the shape rule shards the kernels
ROWS = 96
BATCH = 16


def loss(params, frozen, batch, key):
    """A denoiser of rows of `frozen`, with noise from the key: mean over the batch."""
    clean = frozen["data"][batch["row"]]
    noisy = clean + 0.1 * jax.random.normal(key, clean.shape)
    guess = jnp.tanh(noisy @ params["up.kernel"] + params["up.bias"]) @ params["down.kernel"] + params["down.bias"]
    return jnp.mean((guess - clean) ** 2), {"size": jnp.mean(guess**2)}


def quiet_loss(params, frozen, batch, key):
    """The same without noise, so that the result does not depend on the micro-batches."""
    clean = frozen["data"][batch["row"]]
    guess = jnp.tanh(clean @ params["up.kernel"] + params["up.bias"]) @ params["down.kernel"] + params["down.bias"]
    return jnp.mean((guess - clean) ** 2), {"size": jnp.mean(guess**2)}


def low(params):
    """The kernels in bfloat16."""
    return {name: p.astype(jnp.bfloat16) if name.endswith("kernel") else p for name, p in params.items()}


def low_loss(params, frozen, batch, key):
    """`quiet_loss` with products in bfloat16."""
    kernels, clean = low(params), frozen["data"][batch["row"]]
    inner = jnp.tanh((clean.astype(jnp.bfloat16) @ kernels["up.kernel"]).astype(jnp.float32) + params["up.bias"])
    guess = (inner.astype(jnp.bfloat16) @ kernels["down.kernel"]).astype(jnp.float32)
    return jnp.mean((guess + params["down.bias"] - clean) ** 2), {"size": jnp.mean(guess**2)}


def params(key):
    up, down = jax.random.split(key)
    return {
        "up.kernel": jax.random.normal(up, (WIDTH, 2 * WIDTH)) / WIDTH**0.5,
        "up.bias": jnp.zeros(2 * WIDTH),
        "down.kernel": jax.random.normal(down, (2 * WIDTH, WIDTH)) / (2 * WIDTH) ** 0.5,
        "down.bias": jnp.zeros(WIDTH),
    }


def optimizer():
    schedule = optim.make_schedule("constant", peak=1e-2, warmup_steps=3)
    return optim.make_optimizer(schedule, b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.01, clip=1.0)


def frozen():
    return {"data": np.random.default_rng(0).normal(size=(ROWS, WIDTH)).astype(np.float32)}


def source():
    return batches.ArrayBatches({"row": np.arange(ROWS, dtype=np.int32)}, batch_size=BATCH, seed=3)


def new_state(mesh):
    return devices.create_sharded(lambda key: state.create(params(key), optimizer()), mesh, jax.random.key(0))


def run(workdir, steps, *, fsdp=1, accumulate=1, create=new_state, **changed):
    """Trains in workdir; `changed` replaces arguments of `loop.train`."""
    mesh = devices.make_mesh(fsdp=fsdp)
    writer = metrics.make_writer(workdir, tensorboard=False)
    checkpoints = checkpoint.Checkpoints(Path(workdir) / "checkpoints", keep_last=2, keep_every=0)
    arguments = {
        "step": step.make_train_step(loss, optimizer(), mesh, ema_decay=0.99, accumulate=accumulate),
        "create": functools.partial(create, mesh),
        "like": devices.abstract(jax.eval_shape(functools.partial(create, mesh)), mesh),
        "frozen": frozen(),
        "batches": source(),
        "key": jax.random.key(1),
        "mesh": mesh,
        "checkpoints": checkpoints,
        "writer": writer,
        "config": {"name": "toy"},
        "callbacks": [],
        "steps": steps,
        "log_every": 1,
        "save_every": 2,
        "max_skipped": 3,
        "profile_steps": (0, 0),
        "profile_dir": str(Path(workdir) / "profile"),
    }
    try:
        return loop.train(**(arguments | changed))
    finally:
        writer.close()
        checkpoints.close()


@contextlib.contextmanager
def compile_once(directory):
    """Caches compiled programs in directory, so that tests share them."""
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    _cache_compiled(str(directory), 0.0)
    yield
    _cache_compiled(*before)


def _cache_compiled(directory, seconds):
    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)
    compilation_cache.reset_cache()


def named(tree):
    """Leaves by path."""
    found, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in found}


def leaves(tree):
    """Host copies by path."""
    return {name: np.asarray(leaf) for name, leaf in named(tree).items()}


def start(workdir, steps, *, fsdp=1, devices=1, coordinator="", processes=1, process=0, cache=""):
    """Starts this file as a script in a new process, with simulated devices."""
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    flags |= {"JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo", "PYTHONPATH": str(Path(__file__).parents[1])}
    if cache:
        flags |= {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    arguments = [workdir, steps, fsdp, coordinator, processes, process]
    Path(workdir).mkdir(exist_ok=True)
    with open(Path(workdir) / f"stderr{process}.txt", "w") as stderr:
        command = [sys.executable, __file__, *map(str, arguments)]
        return subprocess.Popen(command, env=os.environ | flags, stderr=stderr)


def finish(workdir, *processes):
    """Waits for the scripts and checks that they succeeded."""
    for process in processes:
        process.wait(timeout=240)
    stderr = "".join(path.read_text() for path in Path(workdir).glob("**/stderr*.txt"))
    assert [process.returncode for process in processes] == [0] * len(processes), stderr


def main(workdir, steps, fsdp, coordinator, processes, process):
    devices.initialize(coordinator=coordinator, processes=int(processes), process=int(process))
    final = run(workdir, int(steps), fsdp=int(fsdp))
    elements = sum(leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(final))
    full = devices.to_host(named(final))
    if jax.process_index() == 0:
        np.savez(Path(workdir) / "result.npz", elements_per_device=elements, **full)


if __name__ == "__main__":
    main(*sys.argv[1:])
