"""A small network with adapters, for the tests of their training; as a script it compares four devices with one."""

import jax
import jax.numpy as jnp
import numpy as np
import toy_training as toy

from instaflow_jax.infra import devices
from instaflow_jax.train import lora, step
from instaflow_jax.train import state as train_state
from instaflow_jax.train.lora import BASE, Lora


def _normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


SHAPES = {"a.conv1.kernel": (3, 3, 4, 8), "a.conv1.bias": (8,), "b.to_q.kernel": (8, 160), "b.to_k.kernel": (160, 120)}
WEIGHTS = {name: _normal(i, *shape) / 4 for i, (name, shape) in enumerate(SHAPES.items())}
ADAPTERS = Lora(3, 6.0, (r"to_\w", "conv1"), (("to_k", 2), (r"to_\w", 4)))
BATCH = {"X": _normal(9, 8, 6, 6, 4)}


def loss(params, frozen, batch, key):
    """A convolution and two linear layers on inputs with a little noise."""
    X = batch["X"] + 0.1 * jax.random.normal(key, batch["X"].shape)
    X = jax.lax.conv_general_dilated(
        X, params["a.conv1.kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    X = jnp.tanh(X + params["a.conv1.bias"]) @ params["b.to_q.kernel"]
    return jnp.mean((jnp.sin(X) @ params["b.to_k.kernel"]) ** 2) * frozen["factor"], {}


def shapes_of(params):
    return {name: jax.ShapeDtypeStruct(p.shape, p.dtype) for name, p in params.items()}


def train(fsdp, some_devices):
    """Three steps; checks the shards, and that the base keeps its bits. Returns the state's leaves on the host."""
    mesh = devices.make_mesh(fsdp=fsdp, devices=some_devices)
    optimizer, ranks = toy.optimizer(), lora.find_ranks(ADAPTERS, WEIGHTS)
    state = devices.create_sharded(
        lambda key: train_state.create(lora.init(key, ranks, shapes_of(WEIGHTS)), optimizer), mesh, jax.random.key(0)
    )
    base = devices.shard(WEIGHTS, mesh)
    assert base["b.to_k.kernel"].addressable_shards[0].data.size == 160 * 120 // fsdp
    adapted = lora.adapt(loss, 6.0, BASE, {})
    update = step.make_train_step(adapted, optimizer, mesh, ema_decay=0.9, accumulate=2, sharded=(BASE,))
    frozen = devices.replicate({"factor": np.float32(1), BASE: base}, mesh)
    assert frozen[BASE]["b.to_k.kernel"] is base["b.to_k.kernel"]
    with jax.set_mesh(mesh):
        compiled = jax.jit(update.update, donate_argnums=0)
        for _ in range(3):
            state, _ = compiled(state, frozen, devices.global_batch(BATCH, mesh), jax.random.key(7))
    for name, value in frozen[BASE].items():
        np.testing.assert_array_equal(value, WEIGHTS[name])
    assert all(".lora_" in name for part in (state.params, state.ema) for name in part)
    named, _ = jax.tree_util.tree_flatten_with_path(state)
    assert sum(leaf.size for _, leaf in named) < sum(p.size for p in WEIGHTS.values())
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in named}


if __name__ == "__main__":
    assert jax.device_count() == 4
    one, many = (train(count, jax.devices()[:count]) for count in (1, 4))
    for name, value in one.items():
        np.testing.assert_allclose(many[name], value, rtol=1e-4, atol=2e-6, err_msg=name)
