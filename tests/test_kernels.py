"""The CPU's convolutions and attention equal XLA's with gradients; other platforms and "xla" do not use them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import normal, relative
from jax import lax

from instaflow_jax.kernels.convolution import convolve, enlarge_and_convolve, resize_nearest
from instaflow_jax.kernels.cpu import attention as cpu_attention
from instaflow_jax.kernels.cpu import convolution as cpu
from instaflow_jax.kernels.cpu import strips
from instaflow_jax.kernels.cpu.winograd import convolve_doubled, winograd
from instaflow_jax.models import layers
from instaflow_jax.models.unet import UNet2DConditionModel
from instaflow_jax.models.vae import AutoencoderKL

SAME = ((1, 1), (1, 1))
NHWC = ("NHWC", "HWIO", "NHWC")
UNET = {
    "block_out_channels": (32,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "layers_per_block": 1,
    "cross_attention_dim": 8,
    "attention_head_dim": 2,
    "norm_num_groups": 8,
}
VAE = {
    "block_out_channels": (32, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 8,
}


def plain(x, kernel, stride=1):
    return lax.conv_general_dilated(x, kernel, (stride, stride), SAME, dimension_numbers=NHWC)


def plain_doubled(x, kernel, bias):
    return plain(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2), kernel) + bias


def with_gradients(function, *inputs):
    """Value and gradients of a function; the loss weighs each output differently."""

    def loss(*inputs):
        y = function(*inputs)
        return jnp.sum(y * (1 + jnp.cos(jnp.arange(y.size))).reshape(y.shape)), y

    (_, y), grads = jax.jit(jax.value_and_grad(loss, tuple(range(len(inputs))), has_aux=True))(*inputs)
    return y, *grads


def assert_equal(function, reference, *inputs):
    """Values and gradients agree to float32's rounding."""
    for got, want in zip(with_gradients(function, *inputs), with_gradients(reference, *inputs), strict=True):
        assert relative(got, want) < 3e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    "function,shape",
    [
        (cpu.by_columns, (2, 3, 5, 6)),
        (winograd, (2, 4, 6, 5)),
        (winograd, (1, 12, 1024, 3)),
        (winograd, (2, 12, 1024, 4)),
    ],
    ids=["columns", "one strip", "strips", "strips in place"],
)
def test_convolutions_equal_xlas(function, shape):
    assert_equal(function, plain, normal(0, *shape), normal(1, 3, 3, shape[-1], 4))


@pytest.mark.slow
@pytest.mark.parametrize("size", [(4, 6), (5, 7)], ids=["even", "odd"])
def test_halving_by_columns_equals_xlas(size):
    halve, reference = (functools.partial(function, stride=2) for function in (cpu.by_columns, plain))
    assert_equal(halve, reference, normal(0, 2, *size, 6), normal(1, 3, 3, 6, 4))


@pytest.mark.slow
def test_strips_divide_the_image(monkeypatch):
    monkeypatch.setattr(strips, "MAX_TILES", 20)  # at most 5 rows of 4 tiles; 3 rows divide the image's 6
    x, kernel = normal(0, 2, 12, 8, 3), normal(1, 3, 3, 3, 4)
    assert relative(jax.jit(winograd)(x, kernel), plain(x, kernel)) < 3e-6


def test_results_of_strips_take_memory_only_when_computed(monkeypatch):
    monkeypatch.setattr(strips, "MAX_TILES", 32)

    def network(x, kernel):
        for _ in range(8):
            x = winograd(x, kernel)
        return jnp.sum(x)

    x, kernel = jnp.ones((1, 32, 32, 16)), jnp.ones((3, 3, 16, 16))
    temporary = jax.jit(network).lower(x, kernel).compile().memory_analysis().temp_size_in_bytes
    assert temporary < 4 * x.nbytes


@pytest.mark.parametrize(
    "function,parts,scale",
    [(winograd, 16, 1), (lambda x, kernel: convolve_doubled(x, kernel, kernel[0, 0, 0]), 9, 2)],
    ids=["winograd", "doubled"],
)
@pytest.mark.parametrize("tiles", [1024, 4], ids=["one strip", "strips"])
def test_transformed_kernels_take_memory_only_when_used(function, parts, scale, tiles, monkeypatch):
    monkeypatch.setattr(strips, "MAX_TILES", tiles)

    def network(x, kernels):
        for kernel in kernels:
            x = function(nnx.silu(x), kernel)[:, ::scale, ::scale]
        return x

    x, kernels = jnp.ones((1, 8, 8, 64)), list(jnp.ones((8, 3, 3, 64, 64)))
    temporary = jax.jit(network).lower(x, kernels).compile().memory_analysis().temp_size_in_bytes
    assert temporary < 2.5 * parts * 64 * 64 * 4


@pytest.mark.parametrize("shape", [(2, 3, 5, 6), (1, 1, 1, 3), (1, 6, 512, 3)], ids=["small", "one pixel", "strips"])
@pytest.mark.slow
def test_a_doubled_image_is_convolved_without_making_it(shape):
    assert_equal(convolve_doubled, plain_doubled, normal(0, *shape), normal(1, 3, 3, shape[-1], 4), normal(2, 4))


def test_a_doubled_image_costs_a_quarter():
    """By XLA's count of FLOPs, which includes additions."""
    inputs = jnp.ones((1, 64, 64, 32)), jnp.ones((3, 3, 32, 32)), jnp.ones(32)
    functions = (plain_doubled, convolve_doubled)
    want, ours = (jax.jit(function).lower(*inputs).cost_analysis()["flops"] for function in functions)
    assert ours < 0.3 * want


@pytest.mark.slow
@pytest.mark.parametrize("size", [(8, 10), (7, 10)], ids=["doubled", "odd"])
@pytest.mark.parametrize("kernels", ["auto", "xla"])
def test_every_way_to_convolve_an_enlarged_image_is_the_same(size, kernels, monkeypatch):
    x, kernel, bias = normal(2, 2, 4, 5, 32), normal(0, 3, 3, 32, 32), normal(1, 32)
    want = plain(resize_nearest(x, size), kernel) + bias
    monkeypatch.setattr(cpu, "MIN_FLOPS", 0)
    assert relative(enlarge_and_convolve(x, kernel, bias, size, kernels=kernels), want) < 3e-6


@pytest.mark.parametrize("context", [512, 77])
def test_attention_by_blocks_equals_attention(context):
    q, k, v = normal(0, 2, 512, 3, 8), normal(1, 2, context, 3, 8), normal(2, 2, context, 3, 8)
    assert_equal(cpu_attention.attention_by_blocks, jax.nn.dot_product_attention, q, k, v)


def test_large_scores_do_not_overflow():
    q, k, v = 100 * normal(0, 1, 256, 1, 8), 100 * normal(1, 1, 256, 1, 8), normal(2, 1, 256, 1, 8)
    want = jax.nn.dot_product_attention(q, k, v)
    assert relative(cpu_attention.attention_by_blocks(q, k, v), want) < 1e-4


COLUMNS, HALVED = "by_columns, stride 1", "by_columns, stride 2"


@pytest.mark.parametrize(
    "x,kernel,way,halving",
    [
        ((1, 8, 8, 1280), (3, 3, 1280, 1280), COLUMNS, HALVED),
        ((1, 64, 64, 320), (3, 3, 320, 320), "winograd", None),
        ((1, 64, 64, 640), (1, 1, 640, 320), "by_pixels", None),
        ((16, 8, 8, 64), (3, 3, 64, 64), None, None),
        ((1, 63, 64, 320), (3, 3, 320, 320), None, None),
        ((1, 512, 512, 128), (3, 3, 128, 3), None, None),
        ((1, 3, 2, 1280), (3, 3, 1280, 640), COLUMNS, HALVED),
        ((1, 32, 32, 640), (3, 3, 640, 640), "winograd", HALVED),
        ((1, 64, 64, 512), (3, 3, 512, 256), "winograd", None),
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
        "… of odd tiles",
        "large but shallow",
    ],
)
def test_the_shape_chooses(x, kernel, way, halving):
    padding = ((kernel[0] // 2,) * 2,) * 2
    x, kernel = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (x, kernel))

    def chosen(x, *strides):
        way = cpu.faster_way(x, kernel, strides, padding)
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
def test_only_large_images_are_doubled_by_differences(x, dtype, pays):
    x, kernel = jax.ShapeDtypeStruct(x, dtype), jax.ShapeDtypeStruct((3, 3, x[-1], x[-1]), dtype)
    assert cpu.doubling_pays(x, kernel) == pays


def lowered(function, *inputs) -> tuple[str, str]:
    """The programs for a CPU and for a GPU; lowering needs neither."""
    traced = jax.jit(function).trace(*inputs)
    return tuple(traced.lower(lowering_platforms=(name,)).as_text() for name in ("cpu", "cuda"))


def test_other_platforms_keep_their_convolution_and_attention(monkeypatch):
    monkeypatch.setattr(cpu, "MIN_FLOPS", 0)
    x, kernel, bias = jnp.ones((1, 4, 4, 32)), jnp.ones((3, 3, 32, 32)), jnp.ones(32)
    loss = jax.grad(lambda x, kernel: jnp.sum(convolve(x, kernel, (1, 1), SAME, dimension_numbers=NHWC) ** 2))
    enlarge = functools.partial(enlarge_and_convolve, size=(8, 8), kernels="auto")
    for on_cpu, on_gpu in (lowered(loss, x, kernel), lowered(enlarge, x, kernel, bias)):
        assert "convolution" in on_gpu and "dot_general" not in on_gpu
        assert "convolution" not in on_cpu and "dot_general" in on_cpu

    on_cpu, on_gpu = lowered(lambda q: layers.attend(q, q, q, 1, "auto", "auto"), jnp.ones((1, 1024, 8)))
    assert "while" in on_cpu and "while" not in on_gpu


@pytest.mark.slow
def test_group_norm_equals_its_definition():
    norm = layers.LayerFactory().group_norm(12, 3, 1e-3)
    norm.scale[...], norm.bias[...] = normal(1, 12), normal(2, 12)
    x = 3 + normal(0, 2, 5, 7, 12)
    groups = x.astype(np.float64).reshape(2, -1, 3, 4)
    mean, variance = groups.mean((1, 3), keepdims=True), groups.var((1, 3), keepdims=True)
    want = ((groups - mean) / np.sqrt(variance + 1e-3)).reshape(x.shape) * norm.scale[...] + norm.bias[...]
    assert relative(norm(x), want) < 1e-6


@pytest.fixture(params=["unet", "vae"])
def loss_of(request, monkeypatch):
    """kernels → (loss, where to take its gradient), with the CPU's own ways for small shapes too."""
    monkeypatch.setattr(cpu, "MIN_FLOPS", 0)
    monkeypatch.setattr(cpu_attention, "MIN_QUERIES", 64)
    monkeypatch.setattr(cpu_attention, "BLOCK", 32)
    model, config, inputs = {
        "unet": (UNet2DConditionModel, UNET, (normal(0, 2, 8, 8, 4), jnp.array([3.5, 900.0]), normal(1, 2, 5, 8))),
        "vae": (AutoencoderKL, VAE, (normal(0, 2, 16, 16, 3),)),
    }[request.param]

    def make(kernels):
        net = model.from_config(config, kernels=kernels)

        def loss(params, x):
            y = net.apply(params, x, *inputs[1:])
            return jnp.mean(y**2), y

        return loss, (net.init(jax.random.key(0)), inputs[0])

    return make


@pytest.mark.slow
def test_both_kernels_give_the_same_output_and_gradient(loss_of):
    results = {}
    for kernels in ("auto", "xla"):
        loss, inputs = loss_of(kernels)
        results[kernels] = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(*inputs)
    (_, output), gradient = results["auto"]
    (_, want_output), want = results["xla"]
    assert relative(output, want_output) < 1e-5
    assert relative(gradient[1], want[1]) < 1e-5
    scale = max(float(jnp.max(jnp.abs(g))) for g in want[0].values())
    for name, g in want[0].items():  # some gradients are zero in exact arithmetic (a bias before a norm)
        assert jnp.max(jnp.abs(gradient[0][name] - g)) < 1e-5 * scale, name


@pytest.mark.slow
def test_only_auto_switches_by_platform(loss_of, monkeypatch):
    cpu_kernels = []
    monkeypatch.setattr(
        jax.lax, "platform_dependent", lambda *args, cpu, default: cpu_kernels.append(cpu) or default(*args)
    )
    for kernels, switches in (("auto", True), ("xla", False)):
        cpu_kernels.clear()
        loss, inputs = loss_of(kernels)
        jax.eval_shape(loss, *inputs)
        assert bool(cpu_kernels) == switches


@pytest.mark.parametrize("field", ["kernels", "attention"])
def test_an_unknown_choice_is_refused(field):
    with pytest.raises(ValueError, match=f"{field}='fast' is not one of"):
        AutoencoderKL.from_config(VAE, **{field: "fast"})
