"""The CPU's own ways to convolve and attend: equal to XLA's operations, gradients too, and left to the CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import normal, relative
from jax import lax

from instaflow_jax.kernels.cpu import dispatch as cpu
from instaflow_jax.kernels.cpu import winograd as convolutions
from instaflow_jax.models import layers

SAME = ((1, 1), (1, 1))


def plain(x, kernel, stride=1):
    return lax.conv_general_dilated(x, kernel, (stride, stride), SAME, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def doubled_then_convolved(x, kernel, bias):
    return plain(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2), kernel) + bias


def with_gradients(function, *inputs):
    """Value and gradients of a function, of which every output counts differently."""

    def loss(*inputs):
        y = function(*inputs)
        return jnp.sum(y * (1 + jnp.cos(jnp.arange(y.size))).reshape(y.shape)), y

    (_, y), grads = jax.jit(jax.value_and_grad(loss, tuple(range(len(inputs))), has_aux=True))(*inputs)
    return y, *grads


@pytest.mark.parametrize(
    "way,shape",
    [
        (cpu.by_columns, (2, 3, 5, 6)),
        (cpu.winograd, (2, 4, 6, 5)),
        (cpu.winograd, (1, 12, 1024, 3)),
        (cpu.winograd, (2, 12, 1024, 4)),
        (cpu.winograd_of_fours, (2, 8, 12, 5)),
        (cpu.winograd_of_fours, (1, 12, 1024, 3)),
        (cpu.winograd_of_fours, (2, 12, 1024, 4)),
    ],
    ids=[
        "columns",
        "one strip",
        "strips",
        "strips in place",
        "fours, one strip",
        "fours, strips",
        "fours, strips in place",
    ],
)
def test_convolutions_equal_xlas(way, shape):
    x, kernel = normal(0, *shape), normal(1, 3, 3, shape[-1], 4)
    for ours, theirs in zip(with_gradients(way, x, kernel), with_gradients(plain, x, kernel), strict=True):
        assert relative(ours, theirs) < 3e-6


def test_winograd_takes_strips_that_fill_the_image(monkeypatch):
    monkeypatch.setattr(convolutions, "_TILES", 20)  # at most 5 rows of 4 tiles, of which 3 divide the 6 that there are
    x, kernel = normal(0, 2, 12, 8, 3), normal(1, 3, 3, 3, 4)
    assert relative(jax.jit(cpu.winograd)(x, kernel), plain(x, kernel)) < 3e-6


def test_results_of_strips_take_memory_only_when_their_turn_comes(monkeypatch):
    monkeypatch.setattr(convolutions, "_TILES", 32)

    def network(x, kernel):
        for _ in range(8):
            x = cpu.winograd(x, kernel)
        return jnp.sum(x)

    x, kernel = jnp.ones((1, 32, 32, 16)), jnp.ones((3, 3, 16, 16))
    temporary = jax.jit(network).lower(x, kernel).compile().memory_analysis().temp_size_in_bytes
    assert temporary < 4 * x.nbytes


@pytest.mark.parametrize(
    "way,parts,scale",
    [
        (cpu.winograd, 16, 1),
        (cpu.winograd_of_fours, 36, 1),
        (lambda x, kernel: cpu.doubled(x, kernel, kernel[0, 0, 0]), 9, 2),
    ],
    ids=["winograd", "fours", "doubled"],
)
@pytest.mark.parametrize("tiles", [1024, 4], ids=["one strip", "strips"])
def test_kernels_are_transformed_only_when_their_turn_comes(way, parts, scale, tiles, monkeypatch):
    monkeypatch.setattr(convolutions, "_TILES", tiles)

    def network(x, kernels):
        for kernel in kernels:
            x = way(nnx.silu(x), kernel)[:, ::scale, ::scale]
        return x

    x, kernels = jnp.ones((1, 8, 8, 64)), list(jnp.ones((8, 3, 3, 64, 64)))
    temporary = jax.jit(network).lower(x, kernels).compile().memory_analysis().temp_size_in_bytes
    assert temporary < 2.5 * parts * 64 * 64 * 4


@pytest.mark.parametrize("shape", [(2, 3, 5, 6), (1, 1, 1, 3), (1, 6, 512, 3)], ids=["small", "one pixel", "strips"])
def test_a_doubled_image_is_convolved_without_being_made(shape):
    inputs = normal(0, *shape), normal(1, 3, 3, shape[-1], 4), normal(2, 4)
    wants = with_gradients(doubled_then_convolved, *inputs)
    for ours, theirs in zip(with_gradients(cpu.doubled, *inputs), wants, strict=True):
        assert relative(ours, theirs) < 3e-6


def test_a_doubled_image_costs_a_quarter():
    """By XLA's count, additions and all."""
    inputs = jnp.ones((1, 64, 64, 32)), jnp.ones((3, 3, 32, 32)), jnp.ones(32)
    want, ours = (jax.jit(way).lower(*inputs).cost_analysis()["flops"] for way in (doubled_then_convolved, cpu.doubled))
    assert ours < 0.3 * want


@pytest.mark.parametrize("size", [(8, 10), (7, 10)], ids=["doubled", "odd"])
def test_an_enlarged_image_is_convolved_the_same_whatever_the_way(size, monkeypatch):
    conv = layers.LayerFactory().conv(32, 32, 3, padding=1)
    conv.kernel[...], conv.bias[...], x = normal(0, 3, 3, 32, 32), normal(1, 32), normal(2, 2, 4, 5, 32)
    want = conv(layers.resize_nearest(x, size))
    monkeypatch.setattr(cpu, "_WORTH", 0)
    assert relative(conv.enlarged(x, size), want) < 3e-6


@pytest.mark.parametrize("context", [512, 77])
def test_attention_in_pieces_equals_attention(context):
    q, k, v = normal(0, 2, 512, 3, 8), normal(1, 2, context, 3, 8), normal(2, 2, context, 3, 8)
    wants = with_gradients(jax.nn.dot_product_attention, q, k, v)
    for ours, theirs in zip(with_gradients(cpu.in_pieces, q, k, v), wants, strict=True):
        assert relative(ours, theirs) < 3e-6


def test_large_scores_do_not_overflow():
    q, k, v = 100 * normal(0, 1, 256, 1, 8), 100 * normal(1, 1, 256, 1, 8), normal(2, 1, 256, 1, 8)
    assert relative(cpu.in_pieces(q, k, v), jax.nn.dot_product_attention(q, k, v)) < 1e-4


@pytest.mark.parametrize("size", [(4, 6), (5, 7)], ids=["even", "odd"])
def test_halving_by_columns_equals_xlas(size):
    inputs = normal(0, 2, *size, 6), normal(1, 3, 3, 6, 4)
    ours, theirs = (with_gradients(functools.partial(way, stride=2), *inputs) for way in (cpu.by_columns, plain))
    for one, other in zip(ours, theirs, strict=True):
        assert relative(one, other) < 3e-6


COLUMNS, HALVED = "by_columns, stride 1", "by_columns, stride 2"


@pytest.mark.parametrize(
    "x,kernel,way,halving",
    [
        ((1, 8, 8, 1280), (3, 3, 1280, 1280), COLUMNS, HALVED),
        ((1, 64, 64, 320), (3, 3, 320, 320), "winograd", None),
        ((1, 64, 64, 640), (1, 1, 640, 320), "<lambda>", None),
        ((16, 8, 8, 64), (3, 3, 64, 64), None, None),
        ((1, 63, 64, 320), (3, 3, 320, 320), None, None),
        ((1, 512, 512, 128), (3, 3, 128, 3), None, None),
        ((1, 3, 2, 1280), (3, 3, 1280, 640), COLUMNS, HALVED),
        ((1, 32, 32, 640), (3, 3, 640, 640), "winograd", HALVED),
        ((1, 64, 64, 512), (3, 3, 512, 256), "winograd_of_fours", None),
        ((1, 62, 66, 512), (3, 3, 512, 256), "winograd", None),
        ((1, 512, 512, 128), (3, 3, 128, 128), "winograd", None),
    ],
    ids=[
        "small image",
        "large image",
        "1×1",
        "small work",
        "odd",
        "few outputs",
        "large kernel for few pixels",
        "… once halved",
        "large and deep",
        "… but not of fours",
        "large but shallow",
    ],
)
def test_the_shape_chooses(x, kernel, way, halving):
    x, kernel = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (x, kernel))

    def chosen(x, *strides):
        way = cpu._other_way(x, kernel, strides, SAME)
        return f"{way.func.__name__}, stride {way.keywords['stride']}" if hasattr(way, "func") else way and way.__name__

    assert (chosen(x, 1, 1), chosen(x, 2, 2)) == (way, halving)
    assert chosen(x, 2, 1) is chosen(x.update(dtype=jnp.bfloat16), 1, 1) is None


@pytest.mark.parametrize(
    "x,dtype,pays",
    [
        ((1, 64, 64, 512), jnp.float32, True),
        ((1, 8, 8, 1280), jnp.float32, True),
        ((16, 8, 8, 64), jnp.float32, False),
        ((1, 64, 64, 512), jnp.bfloat16, False),
        ((1, 512, 512, 16), jnp.float32, False),
    ],
    ids=["large", "large kernel", "small work", "bfloat16", "few channels"],
)
def test_only_large_doubled_images_go_by_differences(x, dtype, pays):
    x, kernel = jax.ShapeDtypeStruct(x, dtype), jax.ShapeDtypeStruct((3, 3, x[-1], x[-1]), dtype)
    assert cpu.doubling_pays(x, kernel) == pays


def test_other_platforms_keep_their_convolution_and_attention(monkeypatch):
    """The same function lowered for a CPU and for a GPU, which need not be here."""
    monkeypatch.setattr(cpu, "_WORTH", 0)
    x, kernel = jnp.ones((1, 4, 4, 32)), jnp.ones((3, 3, 32, 32))
    traced = jax.jit(
        jax.grad(
            lambda x, k: jnp.sum(cpu.convolve(x, k, (1, 1), SAME, dimension_numbers=("NHWC", "HWIO", "NHWC")) ** 2)
        )
    ).trace(x, kernel)
    here, there = (traced.lower(lowering_platforms=(name,)).as_text() for name in ("cpu", "cuda"))
    assert "convolution" in there and "dot_general" not in there
    assert "convolution" not in here and "dot_general" in here

    conv = layers.LayerFactory().conv(32, 32, 3, padding=1)
    traced = jax.jit(lambda x: conv.enlarged(x, (8, 8))).trace(x)
    here, there = (traced.lower(lowering_platforms=(name,)).as_text() for name in ("cpu", "cuda"))
    assert "convolution" in there and "dot_general" not in there
    assert "convolution" not in here and "dot_general" in here

    q = jnp.ones((1, 1024, 1, 8))
    traced = jax.jit(lambda q: layers.attend(q.reshape(1, 1024, 8), q[..., 0, :], q[..., 0, :], 1, "xla")).trace(q)
    here, there = (traced.lower(lowering_platforms=(name,)).as_text() for name in ("cpu", "cuda"))
    assert "while" in here and "while" not in there


def test_group_norm_equals_its_definition():
    norm = layers.LayerFactory().group_norm(12, 3, 1e-3)
    norm.scale[...], norm.bias[...] = normal(1, 12), normal(2, 12)
    x = 3 + normal(0, 2, 5, 7, 12)
    groups = x.astype(np.float64).reshape(2, -1, 3, 4)
    mean, variance = groups.mean((1, 3), keepdims=True), groups.var((1, 3), keepdims=True)
    want = ((groups - mean) / np.sqrt(variance + 1e-3)).reshape(x.shape) * norm.scale[...] + norm.bias[...]
    assert relative(norm(x), want) < 1e-6
