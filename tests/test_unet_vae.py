"""UNet and autoencoder against PyTorch diffusers and its last Flax classes, at small sizes in float32."""

import contextlib
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import normal, randomize, references, relative, with_flax_classes

from instaflow_jax.models.unet import UNet2DConditionModel
from instaflow_jax.models.vae import AutoencoderKL

SD1 = {  # as in SD 1.x: eight heads, convolutions as projections, but three levels: XLA compiles them in 2 s
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2,
    "layers_per_block": 1,
    "cross_attention_dim": 24,
    "attention_head_dim": 8,
    "norm_num_groups": 8,
    "sample_size": 16,
}
SD2 = SD1 | {"attention_head_dim": (2, 4, 8), "use_linear_projection": True}
VAE = {
    "block_out_channels": (16, 32, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "norm_num_groups": 8,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 2,
    "sample_size": 32,
}


def nchw(x):
    return references().from_numpy(x.transpose(0, 3, 1, 2).copy())


def nhwc(x):
    return x.detach().numpy().transpose(0, 2, 3, 1)


def torch_unet(config, seed=0):
    references()
    from diffusers import UNet2DConditionModel as Reference

    return randomize(Reference(**config), seed)


def torch_vae(config=VAE, seed=0):
    references()
    from diffusers import AutoencoderKL as Reference

    return randomize(Reference(**config), seed)


@pytest.mark.slow
@pytest.mark.parametrize("config", [SD1, SD2], ids=["sd1", "sd2"])
@pytest.mark.parametrize("height,width", [(16, 16), (17, 10)], ids=["square", "odd"])
def test_unet_equals_pytorch(config, height, width, tmp_path):
    reference = torch_unet(config)
    reference.save_pretrained(tmp_path)
    net, params = UNet2DConditionModel.from_pretrained(tmp_path)
    x, text, tau = normal(0, 2, height, width, 4), normal(1, 2, 7, 24), np.array([1000.0, 3.5], np.float32)
    torch = references()
    with torch.no_grad():
        want = nhwc(reference(nchw(x), torch.tensor(tau), torch.tensor(text)).sample)
    assert 0.1 < np.std(want) < 10
    assert relative(jax.jit(net.apply)(params, x, tau, text), want) < 1e-5


@pytest.mark.slow
def test_unet_differs_when_an_epsilon_does(tmp_path):
    """The tolerance is tight enough to show a classic mistake: a norm's eps wrong by a factor of ten."""
    torch_unet(SD1).save_pretrained(tmp_path)
    net, params = UNet2DConditionModel.from_pretrained(tmp_path)
    other = UNet2DConditionModel.from_config(net.raw_config | {"norm_eps": 1e-4})
    inputs = normal(0, 1, 16, 16, 4), np.array([500]), normal(1, 1, 7, 24)
    assert relative(jax.jit(other.apply)(params, *inputs), jax.jit(net.apply)(params, *inputs)) > 1e-5


@pytest.mark.slow
def test_vae_equals_pytorch(tmp_path):
    reference = torch_vae()
    reference.save_pretrained(tmp_path)
    net, params = AutoencoderKL.from_pretrained(tmp_path)
    pixels, z = normal(0, 2, 32, 24, 3), normal(1, 2, 8, 6, 4)
    with references().no_grad():
        posterior = reference.encode(nchw(pixels)).latent_dist
        decoded = nhwc(reference.decode(nchw(z)).sample)
    mean, logvar = jax.jit(lambda p, x: net.apply(p, x, method="moments"))(params, pixels)
    assert relative(mean, nhwc(posterior.mean)) < 1e-5
    assert relative(logvar, nhwc(posterior.logvar)) < 1e-5
    decode = jax.jit(lambda p, x: net.apply(p, x, method="decode"))
    assert relative(decode(params, z * net.config.scaling_factor), decoded) < 1e-5


@pytest.mark.slow
def test_vae_encode_draws_from_the_posterior():
    net = AutoencoderKL.from_config(VAE | {"scaling_factor": 0.5})
    params = net.init(jax.random.key(0))
    pixels = jnp.broadcast_to(normal(0, 1, 8, 8, 3), (1024, 8, 8, 3))
    draws = jax.jit(lambda *a: net.apply(*a, method="encode"))(params, pixels, normal(1, 1024, 2, 2, 4))
    mean, logvar = jax.jit(lambda *a: net.apply(*a, method="moments"))(params, pixels[:1])
    np.testing.assert_allclose(draws.mean(0), 0.5 * mean[0], atol=0.1)
    np.testing.assert_allclose(draws.std(0), 0.5 * jnp.exp(0.5 * logvar[0]), rtol=0.1)


@pytest.mark.slow
@with_flax_classes
def test_unet_and_vae_against_the_old_flax_classes(tmp_path, capsys):
    """Second reference: diffusers' own Flax classes on the file we write for them, their error beside ours."""
    references()
    with contextlib.redirect_stderr(io.StringIO()):
        from diffusers import FlaxAutoencoderKL, FlaxUNet2DConditionModel
    torch = references()
    unet, vae = torch_unet(SD1 | {"norm_num_groups": 32}), torch_vae()  # the Flax classes hard-code 32 groups
    unet.save_pretrained(tmp_path / "unet")
    vae.save_pretrained(tmp_path / "vae")
    x, text, tau = normal(0, 2, 16, 16, 4), normal(1, 2, 7, 24), np.array([1000.0, 3.5], np.float32)
    z = normal(2, 2, 8, 8, 4)
    with torch.no_grad():
        wants = nhwc(unet(nchw(x), torch.tensor(tau), torch.tensor(text)).sample), nhwc(vae.decode(nchw(z)).sample)
    net_u, params_u = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    net_v, params_v = AutoencoderKL.from_pretrained(tmp_path / "vae")
    net_u.save_pretrained(params_u, tmp_path / "flax_unet", form="flax")
    net_v.save_pretrained(params_v, tmp_path / "flax_vae", form="flax")
    flax_unet, flax_unet_params = FlaxUNet2DConditionModel.from_pretrained(str(tmp_path / "flax_unet"))
    flax_vae, flax_vae_params = FlaxAutoencoderKL.from_pretrained(str(tmp_path / "flax_vae"))
    theirs = (
        jax.jit(lambda p, *a: flax_unet.apply({"params": p}, *a).sample)(
            flax_unet_params, x.transpose(0, 3, 1, 2), tau, text
        ).transpose(0, 2, 3, 1),
        jax.jit(lambda p, z: flax_vae.apply({"params": p}, z, method=flax_vae.decode).sample)(
            flax_vae_params, z.transpose(0, 3, 1, 2)
        ).transpose(0, 2, 3, 1),
    )
    decode = jax.jit(lambda p, z: net_v.apply(p, z, method="decode"))
    ours = jax.jit(net_u.apply)(params_u, x, tau, text), decode(params_v, z * net_v.config.scaling_factor)
    with capsys.disabled():
        for name, our, their, want in zip(("unet", "vae decoder"), ours, theirs, wants, strict=True):
            print(f"\n{name}: ours {relative(our, want):.1e}, diffusers' Flax {relative(their, want):.1e}", end="")
            assert relative(our, want) < 1e-5
            assert relative(their, want) < 1e-3  # their GELU is the tanh approximation


@pytest.mark.slow
def test_bfloat16_computes_close_to_float32_on_float32_parameters():
    one_level = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    small = SD1 | one_level | {"block_out_channels": (32,)}  # a CPU's bfloat16 takes long to compile
    nets = [UNet2DConditionModel.from_config(small, dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16)]
    params = nets[0].init(jax.random.key(0))
    assert {p.dtype for p in params.values()} == {jnp.dtype("float32")}
    outs = [jax.jit(net.apply)(params, normal(0, 1, 16, 16, 4), 500, normal(1, 1, 7, 24)) for net in nets]
    assert outs[1].dtype == jnp.float32
    assert 1e-5 < relative(outs[1], outs[0]) < 5e-2


@pytest.mark.parametrize(
    "change,words",
    [
        ({"class_embed_type": "timestep"}, ["class_embed_type", "timestep"]),
        (
            {"down_block_types": ["DownBlock2D", "DownBlock2D", "SimpleCrossAttnDownBlock2D"]},
            ["down_block_types", "Simple"],
        ),
    ],
)
def test_an_unsupported_unet_is_refused(change, words):
    with pytest.raises(ValueError) as error:
        UNet2DConditionModel.from_config(SD1 | change)
    assert all(word in str(error.value) for word in words)
