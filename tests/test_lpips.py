"""LPIPS against the `lpips` package: random trunks in torchvision's files, the package's real linear heads."""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import normal, randomize, references, relative

import configs.distill
from instaflow_jax import pipeline
from instaflow_jax.models.lpips import LPIPS, PUBLISHED, VGGClassifier
from instaflow_jax.stages import distill
from instaflow_jax.train import losses
from instaflow_jax.weights import port

HEADS = Path(importlib.util.find_spec("lpips").origin).parent / "weights" / "v0.1"


@pytest.fixture(scope="module", params=[pytest.param("vgg", marks=pytest.mark.slow), "alex"])
def pair(request, tmp_path_factory):
    """The package's network, and ours read from torchvision's state dict and the package's heads."""
    torch = references()
    import lpips
    import torchvision

    name = request.param
    reference = lpips.LPIPS(net=name, pnet_rand=True, verbose=False).eval()
    randomize(reference.net, gain=1.4)  # ReLU halves the variance
    state = {f"features.{key.split('.', 1)[1]}": tensor for key, tensor in reference.net.state_dict().items()}
    with torch.device("meta"):  # names and shapes without the half gigabyte of the classifier, which LPIPS ignores
        classifier_state = {"vgg": torchvision.models.vgg16, "alex": torchvision.models.alexnet}[name]().state_dict()
    assert {k: t.shape for k, t in state.items()} == {
        k: t.shape for k, t in classifier_state.items() if k.startswith("features.")
    }
    path = tmp_path_factory.mktemp("trunk") / "trunk.pth"
    torch.save(state | {key: torch.zeros(1) for key in classifier_state.keys() - state.keys()}, path)
    return torch, reference, *LPIPS.from_files(path, HEADS / f"{name}.pth", net=name)


def torch_distance(torch, reference, a, b, dtype):
    """The package's distances and the gradient of their sum by the first images, NHWC."""
    ta, tb = (torch.tensor(x.transpose(0, 3, 1, 2), dtype=dtype) for x in (a, b))
    ta.requires_grad_(True)
    distance = reference.to(dtype)(ta, tb)[:, 0, 0, 0]
    distance.sum().backward()
    return distance, ta.grad.permute(0, 2, 3, 1)


@pytest.mark.slow
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


@pytest.mark.slow
def test_bfloat16_products_come_close_and_pairs_that_agree_stay_at_zero():
    """What distillation in bfloat16 looks through (`stages.distill.load_lpips` takes the recipe's type)."""
    config = configs.distill.get_config("lpips")
    config.dtype = "bfloat16"
    single, half = (
        LPIPS.from_pretrained(pipeline.locate("openmoji"), "lpips", dtype=t) for t in (np.float32, "bfloat16")
    )
    a, b = (np.tanh(normal(i, 4, 32, 32, 3)) for i in (0, 1))
    values, gradients = zip(
        *(
            jax.jit(jax.value_and_grad(lambda x, net=net, params=params: net.apply(params, x, b).sum()))(a)
            for net, params in (single, half)
        ),
        strict=True,
    )
    assert relative(values[1], values[0]) < 0.01 and relative(gradients[1], gradients[0]) < 0.1
    assert gradients[1].dtype == np.float32 and float(abs(half[0].apply(half[1], a, a)).max()) == 0
    pipe = pipeline.load("openmoji", variant=None, attention="xla", dtype=jax.numpy.bfloat16)
    net, params = distill.load_lpips(config.dtype, **{name: config.lpips[name] for name in distill.LPIPS_FILES})
    distance = losses.make_lpips_distance(pipe.nets["vae"], net, l2=0.0, crop=0, margin=0)
    frozen = {"vae": pipe.params["vae"], "lpips": params}
    x, y = (normal(i, 1, *pipe.latent_shape) for i in (2, 3))
    text = str(jax.make_jaxpr(distance)(frozen, x, {"X1": y}, jax.random.key(0)))
    convolutions = [line.split(" = ")[0] for line in text.splitlines() if "conv_general_dilated[" in line]
    heads = [line for line in convolutions if line.endswith(",1]")]  # they weigh float32 differences of features
    assert len(heads) == 4 and len(convolutions) > 40
    assert all((":f32[" in line) == (line in heads) for line in convolutions), convolutions


def test_small_trunks_go_through_the_disk_and_share_their_classifier(tmp_path):
    config = {"net": "vgg", "widths": [4, 6], "depths": [1, 2]}
    classifier = VGGClassifier.from_config(config | {"num_classes": 5})
    trained = classifier.init(jax.random.key(0))
    net = LPIPS.from_config(config)
    params = net.init(jax.random.key(1)) | {n: p for n, p in trained.items() if n.startswith("features.")}
    net.save_pretrained(params, tmp_path)
    restored, read = LPIPS.from_pretrained(tmp_path)
    a, b = normal(0, 3, 16, 16, 3), normal(1, 3, 16, 16, 3)
    distance = jax.jit(restored.apply)
    assert read.keys() == params.keys()
    np.testing.assert_array_equal(distance(read, a, b), distance(params, a, b))
    assert distance(read, a, b).shape == (3,) and float(distance(read, a, b).min()) > 0
    assert float(abs(distance(read, a, a)).max()) < 1e-12
    assert jax.jit(classifier.apply)(trained, a).shape == (3, 5)


def test_fresh_heads_are_the_package_without_heads(torch):
    """The distance of unit features, summed over channels: what `lpips=False` computes."""
    import lpips

    reference = lpips.LPIPS(net="alex", pnet_rand=True, lpips=False, verbose=False)
    randomize(reference.net, gain=1.4)
    net = LPIPS.from_config(PUBLISHED["alex"])
    trunk = {f"features.{key.split('.', 1)[1]}": t.numpy() for key, t in reference.net.state_dict().items()}
    params = {
        name: port.from_torch(name, trunk[port.torch_key(name)])
        if name.startswith("features.")
        else np.ones(shape.shape, np.float32)
        for name, shape in net.shapes.items()
    }
    a, b = (np.tanh(normal(i, 2, 64, 64, 3)) for i in (0, 1))
    with torch.no_grad():
        want = reference(*(torch.tensor(x.transpose(0, 3, 1, 2)) for x in (a, b))).flatten()
    assert relative(jax.jit(net.apply)(params, a, b), want) < 1e-5
    small = LPIPS.from_config({"widths": [4], "depths": [1]}).init(jax.random.key(0))
    np.testing.assert_array_equal(small["lin0.model.1.kernel"], np.ones((1, 1, 4, 1)))


def test_gradient_is_finite_where_no_channel_responds():
    net = LPIPS.from_config({"widths": [4], "depths": [1]})
    params = net.init(jax.random.key(0)) | {"features.0.bias": -100 * np.ones(4, np.float32)}
    gradient = jax.jit(jax.grad(lambda x: net.apply(params, x, x + 0.1).sum()))(normal(0, 1, 8, 8, 3))
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
