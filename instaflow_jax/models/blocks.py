"""Blocks that the UNet and the autoencoder share: residual block, down- and upsampler."""

import jax
from flax import nnx

from instaflow_jax.kernels.convolution import enlarge_and_convolve
from instaflow_jax.models.layers import LayerFactory, Remat


class ResnetBlock2D(Remat):
    """norm, SiLU, conv, (+ time), norm, SiLU, conv, plus a shortcut: [B, H, W, inputs] → [B, H, W, outputs]."""

    def __init__(
        self, inputs: int, outputs: int, groups: int, eps: float, factory: LayerFactory, time_features: int = 0
    ):
        self.norm1 = factory.group_norm(inputs, groups, eps)
        self.conv1 = factory.conv(inputs, outputs, 3, padding=1)
        if time_features:
            self.time_emb_proj = factory.linear(time_features, outputs)
        self.norm2 = factory.group_norm(outputs, groups, eps)
        self.conv2 = factory.conv(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.conv_shortcut = factory.conv(inputs, outputs, 1)
        self.timed, self.shortcut = bool(time_features), inputs != outputs

    def __call__(self, x, time=None):
        return self.maybe_checkpoint(self._run)(x, time)

    def _run(self, x, time):
        h = self.conv1(jax.nn.silu(self.norm1(x)))
        if self.timed:
            h = h + self.time_emb_proj(jax.nn.silu(time))[:, None, None, :]
        h = self.conv2(jax.nn.silu(self.norm2(h)))
        return h + (self.conv_shortcut(x) if self.shortcut else x)


class Downsample2D(nnx.Module):
    """A convolution of stride 2. `padding` is torch's: 1 all around in the UNet, ((0, 1), (0, 1)) in the VAE."""

    def __init__(self, channels: int, padding, factory: LayerFactory):
        self.conv = factory.conv(channels, channels, 3, stride=2, padding=padding)

    def __call__(self, x):
        return self.conv(x)


class Upsample2D(Remat):
    """Nearest-neighbour enlargement, twofold or to `size`, then a 3×3 convolution."""

    def __init__(self, channels: int, factory: LayerFactory):
        self.conv, self.kernels = factory.conv(channels, channels, 3, padding=1), factory.kernels

    def __call__(self, x, size: tuple[int, int] | None = None):
        kernel, bias = (p[...].astype(self.conv.dtype) for p in (self.conv.kernel, self.conv.bias))
        size = size or (2 * x.shape[1], 2 * x.shape[2])
        return self.maybe_checkpoint(lambda x: enlarge_and_convolve(x, kernel, bias, size, kernels=self.kernels))(x)
