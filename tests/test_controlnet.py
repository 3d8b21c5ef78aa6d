"""ControlNets: the networks against diffusers, files of every kind, `sample`, `serve`, and training one."""

import jax
import numpy as np
import pytest
from helpers import (
    drawn,
    normal,
    randomize,
    references,
    relative,
)

from instaflow_jax.models import controlnet
from instaflow_jax.models.controlnet import ControlNetModel
from instaflow_jax.models.stacked_unet import stack_net, stack_params
from instaflow_jax.models.unet import UNet2DConditionModel

SD1 = {  # SD 1.x's layout: convolutions as projections, no attention in the innermost block
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 24,
    "attention_head_dim": 2,
    "norm_num_groups": 8,
}
SD2 = SD1 | {"attention_head_dim": (2, 4), "use_linear_projection": True}
ONLY_UNET = {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "sample_size": 8}
ONLY_CONTROL = {"conditioning_embedding_out_channels": (8, 12, 16)}  # images four times as large as the latents
SCALES = (0.8, 0.35)


def nchw(x):
    return references().from_numpy(x.transpose(0, 3, 1, 2).copy())


def nhwc(x):
    return x.detach().numpy().transpose(0, 2, 3, 1)


X, TEXT, TAU = normal(0, 2, 8, 6, 4), normal(1, 2, 7, 24), np.array([1000.0, 3.5], np.float32)
IMAGES = [np.random.default_rng(B).random((B, 32, 24, 3), np.float32) for B in (2, 1)]  # for each sample, for both


@pytest.fixture(scope="module", params=[SD1, SD2], ids=["sd1", "sd2"])
def twins(request, tmp_path_factory):
    """diffusers' UNet and two ControlNets with random weights, none of them zero, and the same in this package."""
    references()
    import diffusers

    unet = randomize(diffusers.UNet2DConditionModel(**request.param | ONLY_UNET))
    fields = request.param | ONLY_CONTROL
    controls = [
        randomize(diffusers.ControlNetModel(**fields | {"controlnet_conditioning_channel_order": order}), seed)
        for seed, order in ((1, "rgb"), (2, "bgr"))
    ]
    ours = []
    for theirs, cls in ((unet, UNet2DConditionModel), *((control, ControlNetModel) for control in controls)):
        folder = tmp_path_factory.mktemp("net")
        theirs.save_pretrained(folder)
        ours.append(cls.from_pretrained(folder))
    return unet, controls, ours


def make_params(ours, scales):
    """What `controlnet.make_apply` takes: the UNet's weights, and those of the ControlNets with their images."""
    (_, unet), *controls = ours
    parts = [
        {"params": params, "condition": image, "scale": np.float32(scale)}
        for (_, params), image, scale in zip(controls, IMAGES, scales, strict=False)
    ]
    return {"unet": unet, "controls": parts}


@pytest.mark.slow
def test_residuals_and_unet_equal_diffusers(twins):
    """One ControlNet's residuals, and the UNet's output with two of them at their scales."""
    torch, (unet, controls, ours) = references(), twins
    from diffusers.models import MultiControlNetModel

    inputs, images = (nchw(X), torch.tensor(TAU), torch.tensor(TEXT)), [nchw(IMAGES[0]), nchw(IMAGES[1].repeat(2, 0))]
    with torch.no_grad():
        down, mid = controls[0](*inputs, images[0], conditioning_scale=SCALES[0], return_dict=False)
        both = MultiControlNetModel(controls)(*inputs, images, list(SCALES), return_dict=False)
        residuals = {"down_block_additional_residuals": both[0], "mid_block_additional_residual": both[1]}
        want, alone = nhwc(unet(*inputs, **residuals).sample), nhwc(unet(*inputs).sample)
    apply, first = controlnet.make_apply(ours[0][0], [net for net, _ in ours[1:]]), ours[1][0]

    @jax.jit
    def run(params):
        control = params["controls"][0]
        return apply(params, X, TAU, TEXT), first.apply(control["params"], X, TAU, TEXT, IMAGES[0], SCALES[0])

    got, (got_down, got_mid) = run(make_params(ours, SCALES))
    for residual, reference in zip((*got_down, got_mid), (*down, mid), strict=True):
        assert relative(residual, nhwc(reference)) < 1e-5
    print(f"two ControlNets {relative(got, want):.1e}; they change the output by {relative(want, alone):.2f}")
    assert relative(got, want) < 1e-5 and relative(want, alone) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("twins", [SD2], indirect=True, ids=["sd2"])
def test_both_halves_of_the_stacked_unet_get_the_residuals(twins):
    """Against diffusers' UNet twice: half 2's first residual is added to the features that half 1 passes on."""
    torch, (reference, controls, ours) = references(), twins
    (unet, params), control = ours[0], ours[1]
    net = stack_net(unet, True)
    first, second = [type(reference).from_config(reference.config) for _ in range(2)]
    for half in (first, second):
        half.load_state_dict(reference.state_dict())
    first.conv_out, second.conv_in = torch.nn.Identity(), torch.nn.Identity()
    inputs = torch.tensor(TAU), torch.tensor(TEXT)
    with torch.no_grad():
        down, mid = controls[0](nchw(X), *inputs, nchw(IMAGES[0]), return_dict=False)
        want = nchw(X)
        for half in (first, second):
            residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
            want = half(want, *inputs, **residuals).sample
    stacked = [(net, stack_params(net, params, params)), control]
    got = jax.jit(controlnet.make_apply(net, [control[0]]))(make_params(stacked, (1.0,)), X, TAU, TEXT)
    assert relative(got, nhwc(want)) < 1e-5


def test_a_new_controlnet_adds_nothing_to_the_unet_it_starts_from():
    small = SD1 | {"block_out_channels": (16,), "down_block_types": ("DownBlock2D",)}
    unet = drawn(UNet2DConditionModel.from_config(small | {"up_block_types": ("UpBlock2D",)}))
    net = ControlNetModel.from_config(small | ONLY_CONTROL)
    start = controlnet.init_from_unet(net, unet, jax.random.key(1))
    assert start.keys() == net.shapes.keys()
    copied = [name for name in start if name in unet]
    assert len(copied) > 30 and all(np.allclose(start[name], unet[name]) for name in copied)
    down, mid = jax.jit(net.apply)(start, X, TAU, TEXT, IMAGES[0])
    assert not any(np.any(residual) for residual in (*down, mid))
    assert np.any(start["controlnet_cond_embedding.conv_in.kernel"])


def test_an_unsupported_controlnet_is_refused():
    for field, value in (("global_pool_conditions", True), ("controlnet_conditioning_channel_order", "hsv")):
        with pytest.raises(ValueError, match=f"{field}={value!r} is not supported; use"):
            ControlNetModel.from_config(SD1 | {field: value})
