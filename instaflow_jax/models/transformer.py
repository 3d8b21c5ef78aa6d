"""The transformer inside the UNet: self-attention, attention to the text, gated feed-forward."""

from typing import ClassVar

import jax
from flax import nnx

from instaflow_jax.models.layers import Identity, LayerFactory, Remat, attend


class Attention(Remat):
    """Multi-head attention from x [B, L, C] to context [B, M, D]; `to_q`, `to_k` and `to_v` have no bias."""

    remat: ClassVar = ("attention",)

    def __init__(self, channels: int, context_features: int, heads: int, factory: LayerFactory):
        self.to_q = factory.linear(channels, channels, bias=False)
        self.to_k = factory.linear(context_features, channels, bias=False)
        self.to_v = factory.linear(context_features, channels, bias=False)
        self.to_out = nnx.List([factory.linear(channels, channels)])
        self.heads, self.implementation, self.kernels = heads, factory.attention, factory.kernels

    def __call__(self, x, context):
        run = self.maybe_checkpoint(lambda q, k, v: attend(q, k, v, self.heads, self.implementation, self.kernels))
        return self.to_out[0](run(self.to_q(x), self.to_k(context), self.to_v(context)))


class GEGLU(nnx.Module):
    """A linear layer to two halves h and g, then h · gelu(g) with the exact (erf) GELU."""

    def __init__(self, inputs: int, outputs: int, factory: LayerFactory):
        self.proj = factory.linear(inputs, 2 * outputs)

    def __call__(self, x):
        h, gate = jax.numpy.split(self.proj(x), 2, axis=-1)
        return h * jax.nn.gelu(gate, approximate=False)


class FeedForward(nnx.Module):
    def __init__(self, channels: int, factory: LayerFactory):
        self.net = nnx.List(
            [GEGLU(channels, 4 * channels, factory), Identity(), factory.linear(4 * channels, channels)]
        )

    def __call__(self, x):
        for layer in self.net:
            x = layer(x)
        return x


class BasicTransformerBlock(nnx.Module):
    """x += self-attention; x += attention to the text; x += feed-forward, each after a LayerNorm."""

    def __init__(self, channels: int, context_features: int, heads: int, factory: LayerFactory):
        self.norm1 = factory.layer_norm(channels, 1e-5)
        self.attn1 = Attention(channels, channels, heads, factory)
        self.norm2 = factory.layer_norm(channels, 1e-5)
        self.attn2 = Attention(channels, context_features, heads, factory)
        self.norm3 = factory.layer_norm(channels, 1e-5)
        self.ff = FeedForward(channels, factory)

    def __call__(self, x, context):
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer2DModel(Remat):
    """Pixels as tokens: [B, H, W, C] with text [B, L, D] → [B, H, W, C].

    The projections are 1×1 convolutions in SD 1.x files and linear layers in SD 2.x files; they compute the same.
    """

    def __init__(
        self,
        channels: int,
        context_features: int,
        heads: int,
        depth: int,
        groups: int,
        linear: bool,
        factory: LayerFactory,
    ):
        def projection():
            return factory.linear(channels, channels) if linear else factory.conv(channels, channels, 1)

        self.norm = factory.group_norm(channels, groups, 1e-6)
        self.proj_in = projection()
        self.transformer_blocks = nnx.List(
            [BasicTransformerBlock(channels, context_features, heads, factory) for _ in range(depth)]
        )
        self.proj_out = projection()

    def __call__(self, x, context):
        return self.maybe_checkpoint(self._run)(x, context)

    def _run(self, x, context):
        h = self.proj_in(self.norm(x))
        h = h.reshape(h.shape[0], -1, h.shape[-1])
        for block in self.transformer_blocks:
            h = block(h, context)
        return x + self.proj_out(h.reshape(x.shape))
