"""Attention: which kernel each platform takes, and that the TPU's equals plain attention."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from helpers import normal, relative
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from instaflow_jax.kernels import attention as module
from instaflow_jax.kernels.tpu import attention as tpu


@pytest.fixture
def chosen(monkeypatch):
    """(length, keys, head size, dtype) → the platforms that get a kernel of their own."""
    seen = []

    def record(q, k, v, *, default, **by_platform):
        seen.append(set(by_platform))
        return q

    monkeypatch.setattr(lax, "platform_dependent", record)
    monkeypatch.setattr(module, "_has_cudnn", lambda: True)

    def choose(length, keys, size, dtype, implementation="auto", kernels="auto", causal=False):
        seen.append(set())
        q, k = jnp.zeros((1, length, 1, size), dtype), jnp.zeros((1, keys, 1, size), dtype)
        module.attention(q, k, k, implementation=implementation, kernels=kernels, causal=causal)
        return seen[-1]

    return choose


@pytest.mark.parametrize(
    "length, keys, size, dtype, platforms",
    [
        (4096, 4096, 40, jnp.bfloat16, {"cuda", "tpu"}),  # SD 1.5's outermost self-attention
        (4096, 77, 40, jnp.bfloat16, set()),  # and its attention to the text
        (4096, 78, 40, jnp.bfloat16, {"cuda"}),
        (1024, 1024, 80, jnp.bfloat16, {"cuda", "tpu"}),
        (256, 256, 160, jnp.bfloat16, set()),
        (64, 64, 64, jnp.float16, {"cuda"}),
        (64, 64, 100, jnp.bfloat16, set()),
        (4096, 4096, 512, jnp.bfloat16, {"tpu"}),  # the autoencoder
        (4096, 4096, 40, jnp.float32, {"tpu", "cpu"}),
        (1100, 1100, 40, jnp.float32, set()),
    ],
)
def test_each_platform_takes_the_kernel_that_its_shapes_allow(length, keys, size, dtype, platforms, chosen):
    assert chosen(length, keys, size, dtype) == platforms
    assert chosen(length, keys, size, dtype, implementation="xla") == set()
    assert chosen(length, keys, size, dtype, kernels="xla") == set()
    assert chosen(length, keys, size, dtype, causal=True) == platforms & {"cuda"}


@pytest.mark.parametrize("capability, has", [("7.5", False), ("8.0", True), ("10.0", True)])
def test_a_card_that_is_too_old_for_cudnn_keeps_plain_attention(capability, has, monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: name == "jax_cuda12_plugin")
    card = SimpleNamespace(platform="gpu", compute_capability=capability)
    monkeypatch.setattr(jax, "local_devices", lambda: [card])
    assert module._has_cudnn() == has


def test_without_the_cuda_plugin_there_is_no_cudnn(monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert not module._has_cudnn()


@pytest.mark.slow
@pytest.mark.parametrize("size, heads", [(40, 2), (64, 1), (80, 1), (160, 1), (512, 1)])
@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_the_tpus_flash_attention_equals_plain_attention(size, heads, dtype, tolerance):
    """Output and gradients, in Pallas' interpreter of TPU kernels."""
    q, k, v, out = (normal(seed, 1, 1024, heads, size).astype(dtype) for seed in range(4))

    def value(attend, q, k, v):
        return jnp.sum(attend(q, k, v).astype(jnp.float32) * out.astype(jnp.float32))

    plain = functools.partial(jax.nn.dot_product_attention, implementation="xla")
    precise = [x.astype(jnp.float32) for x in (q, k, v)]
    expected = plain(*precise), *jax.grad(functools.partial(value, plain), (0, 1, 2))(*precise)
    with pltpu.force_tpu_interpret_mode():
        found = (
            tpu.flash_attention(q, k, v),
            *jax.grad(functools.partial(value, tpu.flash_attention), (0, 1, 2))(q, k, v),
        )
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype and relative(ours.astype(jnp.float32), theirs) < tolerance
