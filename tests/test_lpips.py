"""LPIPS against the `lpips` package: random trunks in torchvision's files, the package's real linear heads."""
import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import normal, randomize, references, relative

from instaflow_jax.models.lpips import LPIPS, VGGClassifier

HEADS = Path(importlib.util.find_spec("lpips").origin).parent / "weights" / "v0.1"


@pytest.fixture(scope="module", params=["vgg", "alex"])
def pair(request, tmp_path_factory):
    """The package's network, and ours read from torchvision's state dict and the package's heads."""
    torch = references()
    import lpips
    import torchvision
    name = request.param
    trunk = randomize({"vgg": torchvision.models.vgg16, "alex": torchvision.models.alexnet}[name](), gain=1.4)
    path = tmp_path_factory.mktemp("trunk") / "trunk.pth"
    torch.save({k: t for k, t in trunk.state_dict().items() if "classifier.0" not in k and "classifier.3" not in k}
               | {"classifier.6.bias": torch.zeros(3)}, path)  # without most of the 0.5 GB that LPIPS ignores
    reference = lpips.LPIPS(net=name, pnet_rand=True, verbose=False).eval()
    slices = [getattr(reference.net, f"slice{i + 1}") for i in range(5)]
    for block in slices:
        for index, layer in block.named_children():
            if hasattr(layer, "weight"):
                layer.load_state_dict(trunk.features[int(index)].state_dict())
    return torch, reference, *LPIPS.from_files(path, HEADS / f"{name}.pth", net=name)


def torch_distance(torch, reference, a, b, dtype):
    """The package's distances and the gradient of their sum by the first images, NHWC."""
    ta, tb = (torch.tensor(x.transpose(0, 3, 1, 2), dtype=dtype) for x in (a, b))
    ta.requires_grad_(True)
    distance = reference.to(dtype)(ta, tb)[:, 0, 0, 0]
    distance.sum().backward()
    return distance, ta.grad.permute(0, 2, 3, 1)


def test_distance_and_gradient_equal_the_package(pair):
    """A rounding that pushes one ReLU over its kink moves the gradient by more than 1e-4, PyTorch's as well as ours:
    hence float64 as the judge, and PyTorch's own float32 error as the measure where that is larger."""
    torch, reference, net, params = pair
    a, b = (np.tanh(normal(i, 2, 64, 72, 3)) for i in (0, 1))

    def total(a):
        each = net.apply(params, a, b)
        return each.sum(), each

    (_, distance), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(a)
    exact, exact_gradient = torch_distance(torch, reference, a, b, torch.float64)
    single, single_gradient = torch_distance(torch, reference, a, b, torch.float32)
    assert relative(distance, single) < 1e-5 and relative(distance, exact) < 1e-5
    assert relative(gradient, exact_gradient) < max(1e-4, relative(single_gradient, exact_gradient))
    assert exact.min() > 0


def test_small_trunks_go_through_the_disk_and_share_their_classifier(tmp_path):
    config = {"net": "vgg", "widths": [4, 6], "depths": [1, 2]}
    classifier = VGGClassifier.from_config(config | {"num_classes": 5})
    trained = classifier.init(jax.random.key(0))
    net = LPIPS.from_config(config)
    params = net.init(jax.random.key(1)) | {n: p for n, p in trained.items() if n.startswith("features.")}
    net.save_pretrained(params, tmp_path)
    again, read = LPIPS.from_pretrained(tmp_path)
    a, b = normal(0, 3, 16, 16, 3), normal(1, 3, 16, 16, 3)
    distance = again.apply(read, a, b)
    np.testing.assert_array_equal(distance, net.apply(params, a, b))
    assert distance.shape == (3,) and float(distance.min()) > 0
    np.testing.assert_array_equal(again.apply(read, a, a), np.zeros(3))
    assert classifier.apply(trained, a).shape == (3, 5)


def test_gradient_is_finite_where_no_channel_responds():
    net = LPIPS.from_config({"widths": [4], "depths": [1]})
    params = net.init(jax.random.key(0)) | {"features.0.bias": -100 * np.ones(4, np.float32)}
    gradient = jax.grad(lambda x: net.apply(params, x, x + 0.1).sum())(normal(0, 1, 8, 8, 3))
    assert np.isfinite(gradient).all()


def test_wrong_trunks_and_sizes_are_named(pair, tmp_path):
    _, _, net, params = pair
    with pytest.raises(ValueError, match="too small for a trunk of 5 stages"):
        net.apply(params, np.zeros((1, 8, 8, 3)), np.zeros((1, 8, 8, 3)))
    with pytest.raises(ValueError, match="net='squeeze' is not one of"):
        LPIPS.from_files(tmp_path / "x", tmp_path / "y", net="squeeze")
    other = "alex" if net.config.net == "vgg" else "vgg"
    with pytest.raises(ValueError, match="missing: features"):
        LPIPS.from_files(HEADS / f"{other}.pth", HEADS / f"{other}.pth", net=other)
