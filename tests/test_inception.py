"""FID's Inception against pytorch-fid's own class, random weights carried through a file in its layout."""

import functools

import jax
import numpy as np
import pytest
from helpers import normal, randomize, references, relative

from instaflow_jax.models import inception
from instaflow_jax.models.inception import InceptionV3


@pytest.fixture(scope="module")
def reference():
    """pytorch-fid's network with the FID pooling, made without its download, with random weights and statistics."""
    torch = references()
    import torchvision
    from pytorch_fid import inception as theirs

    net = torchvision.models.inception_v3(num_classes=1008, aux_logits=False, weights=None, init_weights=False)
    net.Mixed_5b = theirs.FIDInceptionA(192, pool_features=32)
    net.Mixed_5c = theirs.FIDInceptionA(256, pool_features=64)
    net.Mixed_5d = theirs.FIDInceptionA(288, pool_features=64)
    for name in ("6b", "6c", "6d", "6e"):
        setattr(net, f"Mixed_{name}", theirs.FIDInceptionC(768, channels_7x7={"6b": 128, "6e": 192}.get(name, 160)))
    net.Mixed_7b, net.Mixed_7c = theirs.FIDInceptionE_1(1280), theirs.FIDInceptionE_2(2048)
    randomize(net, gain=1.4)  # ReLU halves the variance

    class Pooled(theirs.InceptionV3):
        """Its forward pass and blocks, with our random network."""

    original = theirs.fid_inception_v3
    theirs.fid_inception_v3 = lambda: net
    try:
        return torch, net, Pooled([0, 1, 2, 3]).eval()
    finally:
        theirs.fid_inception_v3 = original


@pytest.mark.slow
def test_inception_equals_pytorch_fid(reference, tmp_path):
    torch, net, pooled = reference
    torch.save(net.state_dict(), tmp_path / "inception.pth")
    ours, params = InceptionV3.from_file(tmp_path / "inception.pth")
    images = 1 / (1 + np.exp(-normal(0, 2, 40, 56, 3)))
    with torch.no_grad():
        want = [block.numpy() for block in pooled(torch.tensor(images.transpose(0, 3, 1, 2)))]
    blocks = jax.jit(functools.partial(ours.apply, method="blocks"))(params, images)
    assert [b.shape[-1] for b in blocks] == [64, 192, 768, 2048] and 0.01 < blocks[-1].std() < 100
    for block, theirs in zip(blocks, want, strict=True):
        assert relative(block, theirs.transpose(0, 2, 3, 1).reshape(block.shape)) < 1e-5
    assert jax.eval_shape(ours.apply, params, images).shape == (2, 2048)


@pytest.mark.parametrize("size", [(40, 56), (299, 299), (320, 500)])
def test_resizing_is_torch_bilinear_without_antialias(size, torch):
    images = normal(0, 1, *size, 3)
    want = (
        torch.nn.functional.interpolate(
            torch.tensor(images.transpose(0, 3, 1, 2)), size=(299, 299), mode="bilinear", align_corners=False
        )
        .numpy()
        .transpose(0, 2, 3, 1)
    )
    assert relative(inception.resize(images, 299), want) < 1e-5


@pytest.mark.slow
def test_a_file_that_is_not_the_fid_network_is_refused(reference, tmp_path):
    torch, net, _ = reference
    state = net.state_dict()
    del state["Mixed_7c.branch_pool.conv.weight"]
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"1 missing: Mixed_7c\.branch_pool\.conv\.weight"):
        InceptionV3.from_file(tmp_path / "x.pth")
    with pytest.raises(FileNotFoundError):
        InceptionV3.from_file(tmp_path / "nowhere.pth")
