"""The Stacked U-Net: against two of diffusers' U-Nets, from weights of one or two U-Nets, and in every stage."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    UNET,
    normal,
    randomize,
    references,
    relative,
)

from instaflow_jax.models.stacked_unet import StackedUNet, stack_net, stack_params
from instaflow_jax.models.unet import UNet2DConditionModel
from instaflow_jax.stages.plan import shapes

SMALL = UNET | {"block_out_channels": (8,), "layers_per_block": 1, "attention_head_dim": 2}
SMALL |= {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}


def nchw(x):
    return references().from_numpy(x.transpose(0, 3, 1, 2).copy())


def nhwc(x):
    return x.detach().numpy().transpose(0, 2, 3, 1)


# ---------------------------------------------------------------- the network


def test_parameters_at_sd15s_size():
    """2 × 859,520,964, less conv_out's 11,524 and conv_in's 11,840."""
    nets = shapes.make_nets(shapes.read_configs("sd15_stacked"))
    assert sum(math.prod(p.shape) for p in nets["unet"].shapes.values()) == 1_719_018_564
    assert nets["unet"].module is StackedUNet


@pytest.fixture(scope="module")
def twins():
    """Two of diffusers' U-Nets with random weights."""
    references()
    from diffusers import UNet2DConditionModel as Reference

    return [randomize(Reference(**SMALL), seed) for seed in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("middle_norm", [True, False])
def test_it_equals_two_unets_of_diffusers_in_series(middle_norm, twins, tmp_path):
    """Output, and gradients by the input and by one weight of each half."""
    torch, nets = references(), []
    for i, twin in enumerate(twins):
        twin.save_pretrained(tmp_path / str(i))
        nets.append(UNet2DConditionModel.from_pretrained(tmp_path / str(i)))
    net = stack_net(nets[0][0], middle_norm)
    params = stack_params(net, nets[0][1], nets[1][1])
    x, text, tau = normal(0, 2, 8, 8, 4), normal(1, 2, 7, 16), np.array([1000.0, 3.5], np.float32)

    def features(unet, sample):  # diffusers' forward with a part taken out
        return unet(sample, torch.tensor(tau), torch.tensor(text)).sample

    first, second = (type(twin).from_config(twin.config) for twin in twins)
    for copy, twin in zip((first, second), twins, strict=True):
        copy.load_state_dict(twin.state_dict())
    first.conv_out, second.conv_in = torch.nn.Identity(), torch.nn.Identity()
    if not middle_norm:
        first.conv_norm_out = None
    z = nchw(x).requires_grad_()
    out = features(second, features(first, z))
    out.square().mean().backward()
    want = nhwc(out)

    loss = lambda p, x: jnp.mean(net.apply(p, x, tau, text) ** 2)  # noqa: E731
    ours, (by_params, by_x) = jax.jit(lambda p, x: (net.apply(p, x, tau, text), jax.grad(loss, (0, 1))(p, x)))(
        params, x
    )
    assert 0.01 < np.std(want) < 10
    print(f"middle_norm={middle_norm}: output {relative(ours, want):.1e}, gradient {relative(by_x, nhwc(z.grad)):.1e}")
    assert relative(ours, want) < 1e-5
    assert relative(by_x, nhwc(z.grad)) < 1e-5
    for half, unet in enumerate((first, second)):
        theirs = unet.mid_block.resnets[0].conv1.weight.grad.numpy().transpose(2, 3, 1, 0)
        assert relative(by_params[f"halves.{half}.mid_block.resnets.0.conv1.kernel"], theirs) < 1e-5
    assert all(np.any(np.asarray(g) != 0) for name, g in by_params.items() if name.endswith("kernel"))
