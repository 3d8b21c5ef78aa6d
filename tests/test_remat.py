"""Rematerialisation: the same outputs and gradients, less memory, and nothing else changes."""

import jax
import jax.numpy as jnp
import pytest
from helpers import normal, relative

from instaflow_jax.models.lpips import LPIPS
from instaflow_jax.models.unet import UNet2DConditionModel
from instaflow_jax.models.vae import AutoencoderKL
from instaflow_jax.train import losses

# XLA:CPU removes jax.checkpoint's barriers before it plans memory, so that rematerialised values are computed early.
# GPU and TPU keep the barriers, and so does the CPU with this option.
PLAN = {"xla_disable_hlo_passes": "cse_barrier_expander"}

# Few channels and 144 tokens: shapes for which `kernels.cpu` has no implementation.
UNET = UNet2DConditionModel.from_config(
    {
        "sample_size": 12,
        "block_out_channels": (16, 24),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": 24,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
)
VAE = AutoencoderKL.from_config(
    {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "norm_num_groups": 4,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "sample_size": 32,
    }
)
TRUNK = LPIPS.from_config({"net": "vgg", "widths": (8, 16), "depths": (2, 2)})
UNET_INPUTS = normal(0, 8, 12, 12, 4), jnp.linspace(1.0, 1000.0, 8), normal(1, 8, 7, 24)


def unet_loss(remat):
    """∂/∂weights of the mean square of the output."""
    net = UNET.with_remat(remat)
    return lambda params: jnp.mean(net.apply(params, *UNET_INPUTS) ** 2), net.init(jax.random.key(0))


def lpips_loss(remat):
    """∂/∂latents of the perceptual distance between decoded images: the distillation's second phase."""
    distance = losses.make_lpips_distance(VAE.with_remat(remat), TRUNK.with_remat(remat), l2=0.0, crop=0, margin=0)
    frozen = {"vae": VAE.init(jax.random.key(1)), "lpips": TRUNK.init(jax.random.key(2))}
    batch = {"X1": normal(3, 4, 12, 12, 4)}
    return lambda X1_hat: distance(frozen, X1_hat, batch, None)[0], normal(4, 4, 12, 12, 4)


@pytest.fixture(scope="module", params=[unet_loss, lpips_loss], ids=["unet", "decoder and trunk"])
def results(request):
    """remat → (loss, gradient, temporary memory in XLA's plan with the settings of accelerators)."""
    results = {}
    for remat in ("none", "attention", "blocks"):
        loss, at = request.param(remat)
        compiled = jax.jit(jax.value_and_grad(loss)).lower(at).compile(compiler_options=PLAN)
        results[remat] = *compiled(at), compiled.memory_analysis().temp_size_in_bytes
    return results


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["attention", "blocks"])
def test_gradients_stay_the_same(results, remat):
    (value, gradient, _), (want_value, want, _) = results[remat], results["none"]
    assert relative(value, want_value) < 1e-6
    for ours, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(want), strict=True):
        assert jnp.linalg.norm(theirs) > 0
        assert relative(ours, theirs) < 1e-6


@pytest.mark.slow
def test_memory_falls(results):
    none, attention, blocks = (results[remat][2] for remat in ("none", "attention", "blocks"))
    assert attention < 0.9 * none
    assert blocks < 0.65 * none
    assert blocks < attention


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["attention", "blocks"])
def test_without_a_gradient_nothing_changes(remat):
    params = UNET.init(jax.random.key(0))
    plain, ours = (jax.jit(net.apply).lower(params, *UNET_INPUTS).compile() for net in (UNET, UNET.with_remat(remat)))
    assert ours.cost_analysis()["flops"] == plain.cost_analysis()["flops"]
    assert ours.memory_analysis().temp_size_in_bytes == plain.memory_analysis().temp_size_in_bytes
    assert jnp.array_equal(ours(params, *UNET_INPUTS), plain(params, *UNET_INPUTS))


def test_a_choice_can_be_undone_and_keeps_the_names_of_weights():
    blocks = UNET.with_remat("blocks")
    assert blocks.shapes == UNET.shapes and blocks.raw_config == UNET.raw_config
    assert blocks.with_remat("none").graphdef == UNET.with_remat("none").graphdef != blocks.graphdef


def test_an_unknown_choice_is_refused():
    with pytest.raises(ValueError, match="remat='all' is not one of none, attention, blocks"):
        UNET.with_remat("all")
