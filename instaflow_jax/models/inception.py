"""The Inception network of the FID (Heusel et al., 2017) with the pooling quirks of its published weights.

The weights come from TensorFlow in 2015; we read the file of `pytorch-fid`, which converted them. Unlike torchvision's
Inception v3, average pools leave padding out of the mean, and the last block has a maximum pool instead.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from instaflow_jax.arrays import AnyArray
from instaflow_jax.models.layers import DEFERRED_INIT, NO_RNGS, LayerFactory
from instaflow_jax.models.net import Config, Model, Net, Params
from instaflow_jax.weights import hub, port


@dataclasses.dataclass(frozen=True)
class InceptionConfig(Config):
    """`image_size`: the side in pixels to which images are resized. The weights fix everything else."""

    image_size: int = 299


class FrozenBatchNorm(nnx.Module):
    """Batch normalisation with stored statistics, which are ordinary parameters here; eps is 1e-3."""

    def __init__(self, channels: int):
        self.scale, self.bias = nnx.Param(jnp.ones(channels)), nnx.Param(jnp.zeros(channels))
        self.mean, self.var = nnx.Param(jnp.zeros(channels)), nnx.Param(jnp.ones(channels))

    def __call__(self, x):
        factor = self.scale[...] * jax.lax.rsqrt(self.var[...] + 1e-3)
        return (x - self.mean[...]) * factor + self.bias[...]


class BasicConv2d(nnx.Module):
    """Convolution without bias, batch norm, ReLU. `kernel` and `padding` are an int or (height, width)."""

    def __init__(self, factory: LayerFactory, inputs: int, outputs: int, kernel, stride: int = 1, padding=0):
        kernel, padding = (p if isinstance(p, tuple) else (p, p) for p in (kernel, padding))
        self.conv = nnx.Conv(
            inputs,
            outputs,
            kernel,
            stride,
            padding=[(p, p) for p in padding],
            use_bias=False,
            dtype=factory.dtype,
            **DEFERRED_INIT,
            rngs=NO_RNGS,
        )
        self.bn = FrozenBatchNorm(outputs)

    def __call__(self, x):
        return jax.nn.relu(self.bn(self.conv(x)))


def _average(x):
    return nnx.avg_pool(x, (3, 3), (1, 1), ((1, 1), (1, 1)), count_include_pad=False)


def _maximum(x):
    return nnx.max_pool(x, (3, 3), (1, 1), ((1, 1), (1, 1)))


def _halve(x):
    return nnx.max_pool(x, (3, 3), (2, 2))


class Block(nnx.Module):
    """Base of the blocks, whose branches `branch_1`, `branch_2` … are chains of convolutions."""

    def chain(self, x, branch: str, count: int):
        return _chain(x, *(getattr(self, f"{branch}_{i}") for i in range(1, count + 1)))


def _chain(x, *layers):
    for layer in layers:
        x = layer(x)
    return x


def _join(*branches):
    return jnp.concatenate(branches, axis=-1)


class InceptionA(Block):
    def __init__(self, factory: LayerFactory, inputs: int, pooled: int):
        self.branch1x1 = BasicConv2d(factory, inputs, 64, 1)
        self.branch5x5_1 = BasicConv2d(factory, inputs, 48, 1)
        self.branch5x5_2 = BasicConv2d(factory, 48, 64, 5, padding=2)
        self.branch3x3dbl_1 = BasicConv2d(factory, inputs, 64, 1)
        self.branch3x3dbl_2 = BasicConv2d(factory, 64, 96, 3, padding=1)
        self.branch3x3dbl_3 = BasicConv2d(factory, 96, 96, 3, padding=1)
        self.branch_pool = BasicConv2d(factory, inputs, pooled, 1)

    def __call__(self, x):
        return _join(
            self.branch1x1(x),
            self.chain(x, "branch5x5", 2),
            self.chain(x, "branch3x3dbl", 3),
            self.branch_pool(_average(x)),
        )


class InceptionB(Block):
    def __init__(self, factory: LayerFactory, inputs: int):
        self.branch3x3 = BasicConv2d(factory, inputs, 384, 3, stride=2)
        self.branch3x3dbl_1 = BasicConv2d(factory, inputs, 64, 1)
        self.branch3x3dbl_2 = BasicConv2d(factory, 64, 96, 3, padding=1)
        self.branch3x3dbl_3 = BasicConv2d(factory, 96, 96, 3, stride=2)

    def __call__(self, x):
        return _join(self.branch3x3(x), self.chain(x, "branch3x3dbl", 3), _halve(x))


class InceptionC(Block):
    def __init__(self, factory: LayerFactory, inputs: int, inner: int):
        row, column = {"kernel": (1, 7), "padding": (0, 3)}, {"kernel": (7, 1), "padding": (3, 0)}
        self.branch1x1 = BasicConv2d(factory, inputs, 192, 1)
        self.branch7x7_1 = BasicConv2d(factory, inputs, inner, 1)
        self.branch7x7_2 = BasicConv2d(factory, inner, inner, **row)
        self.branch7x7_3 = BasicConv2d(factory, inner, 192, **column)
        self.branch7x7dbl_1 = BasicConv2d(factory, inputs, inner, 1)
        self.branch7x7dbl_2 = BasicConv2d(factory, inner, inner, **column)
        self.branch7x7dbl_3 = BasicConv2d(factory, inner, inner, **row)
        self.branch7x7dbl_4 = BasicConv2d(factory, inner, inner, **column)
        self.branch7x7dbl_5 = BasicConv2d(factory, inner, 192, **row)
        self.branch_pool = BasicConv2d(factory, inputs, 192, 1)

    def __call__(self, x):
        return _join(
            self.branch1x1(x),
            self.chain(x, "branch7x7", 3),
            self.chain(x, "branch7x7dbl", 5),
            self.branch_pool(_average(x)),
        )


class InceptionD(Block):
    def __init__(self, factory: LayerFactory, inputs: int):
        self.branch3x3_1 = BasicConv2d(factory, inputs, 192, 1)
        self.branch3x3_2 = BasicConv2d(factory, 192, 320, 3, stride=2)
        self.branch7x7x3_1 = BasicConv2d(factory, inputs, 192, 1)
        self.branch7x7x3_2 = BasicConv2d(factory, 192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = BasicConv2d(factory, 192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = BasicConv2d(factory, 192, 192, 3, stride=2)

    def __call__(self, x):
        return _join(self.chain(x, "branch3x3", 2), self.chain(x, "branch7x7x3", 4), _halve(x))


class InceptionE(Block):
    """The widest block. `pool` is an average in the first and, for these weights only, a maximum in the last."""

    def __init__(self, factory: LayerFactory, inputs: int, pool):
        row, column = {"kernel": (1, 3), "padding": (0, 1)}, {"kernel": (3, 1), "padding": (1, 0)}
        self.pool = pool
        self.branch1x1 = BasicConv2d(factory, inputs, 320, 1)
        self.branch3x3_1 = BasicConv2d(factory, inputs, 384, 1)
        self.branch3x3_2a = BasicConv2d(factory, 384, 384, **row)
        self.branch3x3_2b = BasicConv2d(factory, 384, 384, **column)
        self.branch3x3dbl_1 = BasicConv2d(factory, inputs, 448, 1)
        self.branch3x3dbl_2 = BasicConv2d(factory, 448, 384, 3, padding=1)
        self.branch3x3dbl_3a = BasicConv2d(factory, 384, 384, **row)
        self.branch3x3dbl_3b = BasicConv2d(factory, 384, 384, **column)
        self.branch_pool = BasicConv2d(factory, inputs, 192, 1)

    def __call__(self, x):
        single, double = self.branch3x3_1(x), self.chain(x, "branch3x3dbl", 2)
        return _join(
            self.branch1x1(x),
            self.branch3x3_2a(single),
            self.branch3x3_2b(single),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(self.pool(x)),
        )


class InceptionV3(Model):
    """Images → the 2048 features whose mean and covariance the FID compares."""

    Config = InceptionConfig
    layout = hub.Layout("model", ignore=(r"^fc\.",))  # the classifier, which the FID does not use

    def __init__(self, config: InceptionConfig, factory: LayerFactory):
        self.image_size = config.image_size
        self.Conv2d_1a_3x3 = BasicConv2d(factory, 3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = BasicConv2d(factory, 32, 32, 3)
        self.Conv2d_2b_3x3 = BasicConv2d(factory, 32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = BasicConv2d(factory, 64, 80, 1)
        self.Conv2d_4a_3x3 = BasicConv2d(factory, 80, 192, 3)
        self.Mixed_5b = InceptionA(factory, 192, 32)
        self.Mixed_5c = InceptionA(factory, 256, 64)
        self.Mixed_5d = InceptionA(factory, 288, 64)
        self.Mixed_6a = InceptionB(factory, 288)
        self.Mixed_6b = InceptionC(factory, 768, 128)
        self.Mixed_6c = InceptionC(factory, 768, 160)
        self.Mixed_6d = InceptionC(factory, 768, 160)
        self.Mixed_6e = InceptionC(factory, 768, 192)
        self.Mixed_7a = InceptionD(factory, 768)
        self.Mixed_7b = InceptionE(factory, 1280, _average)
        self.Mixed_7c = InceptionE(factory, 2048, _maximum)

    @classmethod
    def from_file(cls, path: str | Path, *, dtype=jnp.float32) -> tuple[Net, Params]:
        """Reads pytorch-fid's `pt_inception-2015-12-05-6726825d.pth`, or the same weights as safetensors.

        Raises:
          FileNotFoundError: the file is missing.
          ValueError: its weights do not fit, the first offenders named.
        """
        net = cls.from_config({}, dtype=dtype)
        return net, port.fill(port.open_weights(Path(path)), net.shapes, cls.layout, source=str(path))

    def blocks(self, images: Float[AnyArray, "B H W 3"]) -> list[Array]:
        """pytorch-fid's four outputs: maps with 64, 192 and 768 channels, and pooled features [B, 2048]."""
        x = 2 * resize(images, self.image_size) - 1
        first = _halve(_chain(x, self.Conv2d_1a_3x3, self.Conv2d_2a_3x3, self.Conv2d_2b_3x3))
        second = _halve(_chain(first, self.Conv2d_3b_1x1, self.Conv2d_4a_3x3))
        third = _chain(second, self.Mixed_5b, self.Mixed_5c, self.Mixed_5d)
        third = _chain(third, self.Mixed_6a, self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e)
        last = _chain(third, self.Mixed_7a, self.Mixed_7b, self.Mixed_7c)
        return [first, second, third, last.astype(jnp.float32).mean((1, 2))]

    def __call__(self, images: Float[AnyArray, "B H W 3"]) -> Float[Array, "B 2048"]:
        """Features of `images` of any size, with values in [0, 1]."""
        return self.blocks(images)[-1]


def resize(images: Float[AnyArray, "B H W C"], side: int) -> Float[Array, "B {side} {side} C"]:
    """Bilinear without antialiasing, as pytorch-fid does it: torch's `interpolate(align_corners=False)`."""
    shape = (images.shape[0], side, side, images.shape[3])
    return jax.image.resize(images, shape, "bilinear", antialias=False)
