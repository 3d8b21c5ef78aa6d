"""LPIPS (Zhang et al., 2018), version 0.1 of the `lpips` package: a perceptual distance from a classifier's features.

The trunk is torchvision's `vgg16` or `alexnet` with the same names (`features.N`). The published widths and the small
trunks that are trained here as a `VGGClassifier` differ only in `config.json`.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from instaflow_jax.arrays import Image, PerSample
from instaflow_jax.models.layers import NO_RNGS, Identity, LayerFactory, Remat
from instaflow_jax.models.net import Config, Model, Net, Params
from instaflow_jax.weights import hub, port

PUBLISHED = {
    "vgg": {"net": "vgg", "widths": (64, 128, 256, 512, 512), "depths": (2, 2, 3, 3, 3)},
    "alex": {"net": "alex", "widths": (64, 192, 384, 256, 256), "depths": (1, 1, 1, 1, 1)},
}
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # ImageNet's mean and deviation in [-1, 1]


@dataclasses.dataclass(frozen=True)
class TrunkConfig(Config):
    """A stack of stages; stage i has `depths[i]` convolutions with `widths[i]` channels.

    Attributes:
      net: "vgg" (3×3 kernels, pooling between all stages) or "alex" (AlexNet's kernels, strides and two poolings).
    """

    net: str = "vgg"
    widths: tuple[int, ...] = PUBLISHED["vgg"]["widths"]
    depths: tuple[int, ...] = PUBLISHED["vgg"]["depths"]

    def __post_init__(self):
        if self.net not in PUBLISHED:
            raise ValueError(f"config.json: net={self.net!r} is not one of {sorted(PUBLISHED)}")
        if len(self.widths) != len(self.depths):
            raise ValueError(
                f"config.json: widths {self.widths} and depths {self.depths} differ in length; give both for each stage"
            )


@dataclasses.dataclass(frozen=True)
class ClassifierConfig(TrunkConfig):
    """A trunk and the number of classes of its linear head."""

    num_classes: int = 1000


class Relu(nnx.Module):
    def __call__(self, x):
        return nnx.relu(x)


class MaxPool(nnx.Module):
    def __init__(self, size: int):
        self.size = size

    def __call__(self, x):
        return nnx.max_pool(x, (self.size, self.size), (2, 2))


def _stage(net: str, i: int) -> tuple[dict, int | None]:
    """Options of stage i's first convolution, and the size of the pooling before it."""
    if net == "vgg":
        return {"kernel": 3, "padding": 1}, 2 if i else None
    first = ({"kernel": 11, "stride": 4, "padding": 2}, {"kernel": 5, "padding": 2})
    return first[i] if i < 2 else {"kernel": 3, "padding": 1}, 3 if i in (1, 2) else None


def _trunk(config: TrunkConfig, factory: LayerFactory) -> tuple[list[Callable], tuple[int, ...]]:
    """torchvision's `features`, and the indices of the layers whose outputs LPIPS compares (the last of each stage)."""
    layers, taps, inputs = [], [], 3
    for i, (width, depth) in enumerate(zip(config.widths, config.depths, strict=True)):
        shape, pool = _stage(config.net, i)
        layers += [MaxPool(pool)] if pool else []
        for _ in range(depth):
            layers += [factory.conv(inputs, width, **shape), Relu()]
            inputs, shape = width, {"kernel": 3, "padding": 1}
        taps.append(len(layers) - 1)
    return layers, tuple(taps)


def _run(
    features: Sequence[Callable], taps: tuple[int, ...], images, maybe_checkpoint: Callable = lambda stage: stage
) -> list[Array]:
    """The output of each stage for `images` in [-1, 1]; each stage runs as `maybe_checkpoint(stage)`."""

    def chain(layers, x):
        for layer in layers:
            x = layer(x)
            if 0 in x.shape:
                raise ValueError(
                    f"images of {images.shape[1]}x{images.shape[2]} pixels are too small for a trunk of "
                    f"{len(taps)} stages; enlarge them"
                )
        return x

    x, outputs = (images - jnp.asarray(_SHIFT)) / jnp.asarray(_SCALE), []
    for before, last in itertools.pairwise((-1, *taps)):
        x = maybe_checkpoint(functools.partial(chain, features[before + 1 : last + 1]))(x)
        outputs.append(x)
    return outputs


class NetLinLayer(nnx.Module):
    """Weights for the channels of one stage; all ones at first, as with the package's `lpips=False`."""

    def __init__(self, width: int):
        ones = nnx.initializers.ones
        self.model = nnx.List([Identity(), nnx.Conv(width, 1, (1, 1), use_bias=False, kernel_init=ones, rngs=NO_RNGS)])

    def __call__(self, x):
        return self.model[1](x)


class Trunk(Model):
    """torchvision's `features`, which LPIPS and the classifier share."""

    def __init__(self, config: TrunkConfig, factory: LayerFactory):
        layers, self.taps = _trunk(config, factory)
        self.features = nnx.List(layers)

    def pooled(self, images: Image) -> Float[Array, "B C"]:
        """Mean over pixels of the last stage, for `images` in [-1, 1]."""
        return _run(self.features, self.taps, images)[-1].mean((1, 2))


class LPIPS(Remat, Trunk):
    """Perceptual distance between the images of each pair."""

    Config = TrunkConfig
    layout = hub.Layout("model", ignore=(r"^classifier\.",))  # torchvision's files contain the classifier too

    def __init__(self, config: TrunkConfig, factory: LayerFactory):
        super().__init__(config, factory)
        for i, width in enumerate(config.widths):
            setattr(self, f"lin{i}", NetLinLayer(width))

    @classmethod
    def from_files(cls, trunk: str | Path, heads: str | Path, *, net: str, dtype=jnp.float32) -> tuple[Net, Params]:
        """Reads torchvision's state dict for the trunk and the `lpips` package's `weights/v0.1/{net}.pth`.

        Raises:
          FileNotFoundError: a file is missing.
          ValueError: `net` is unknown or the weights do not fit, the first offenders named.
        """
        if net not in PUBLISHED:
            raise ValueError(f"net={net!r} is not one of {sorted(PUBLISHED)}")
        network = cls.from_config(PUBLISHED[net], dtype=dtype)
        stored = {**port.open_weights(Path(trunk)), **port.open_weights(Path(heads))}
        return network, port.fill(stored, network.shapes, cls.layout, source=f"{trunk} with {heads}")

    def __call__(self, a: Image, b: Image) -> PerSample:
        """Distance of each image in `a` to its partner in `b`, values in [-1, 1]."""
        # Not as one batch: JAX then skips the backward pass of images without gradient (a distillation's target).
        x, y = (_run(self.features, self.taps, images, self.maybe_checkpoint) for images in (a, b))
        heads = [getattr(self, f"lin{i}") for i in range(len(self.taps))]
        compare = [self.maybe_checkpoint(functools.partial(_compare, head)) for head in heads]
        return sum(distance(*stage) for distance, *stage in zip(compare, x, y, strict=True))


def _compare(head: NetLinLayer, x, y) -> PerSample:
    """The distance of one stage's features x and y."""
    return head((_unit(x.astype(jnp.float32)) - _unit(y.astype(jnp.float32))) ** 2).mean((1, 2, 3))


def _unit(x):
    """Scales to unit length along channels. Where all channels are zero, the gradient is zero; PyTorch's is NaN."""
    square = jnp.sum(x**2, axis=-1, keepdims=True)
    dead = square == 0
    return x / (jnp.where(dead, 0.0, jnp.sqrt(jnp.where(dead, 1.0, square))) + 1e-10)


class VGGClassifier(Trunk):
    """A trunk with pooling and a linear head, for pretraining a trunk; LPIPS takes its `features.*` unchanged."""

    Config = ClassifierConfig
    layout = hub.Layout("model")

    def __init__(self, config: ClassifierConfig, factory: LayerFactory):
        super().__init__(config, factory)
        self.classifier = factory.linear(config.widths[-1], config.num_classes)

    def __call__(self, images: Image) -> Float[Array, "B K"]:
        """Logits of `images` with values in [-1, 1]."""
        return self.classifier(self.pooled(images))
