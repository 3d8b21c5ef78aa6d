"""Flash attention on TPUs: jax's Pallas kernel, which keeps the L × L scores in the chip's fast memory."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Float

from instaflow_jax.arrays import AnyArray

MIN_TOKENS = 1024  # below, the scores are small, and XLA's attention reads and writes less
LANES = 128  # of head sizes above this the kernel takes only multiples
_BLOCK = 512


def runs(q, k) -> bool:
    """Whether `flash_attention` computes queries [B, L, heads, D] and keys [B, M, heads, D]: long self-attention."""
    length = q.shape[1]
    return length == k.shape[1] and length >= MIN_TOKENS and length % _BLOCK == 0


def flash_attention(
    q: Float[AnyArray, "B L heads D"], k: Float[AnyArray, "B L heads D"], v: Float[AnyArray, "B L heads D"]
) -> Float[AnyArray, "B L heads D"]:
    """softmax(q kᵀ / √D) v by blocks of queries and keys.

    XLA cannot split a Pallas kernel between devices. Under a mesh (`jax.set_mesh`) with automatic axes each device
    computes its own rows of the batch.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not mesh.auto_axes:
        return _on_one_device(q, k, v)
    rows = PartitionSpec(mesh.auto_axes)
    return jax.shard_map(_on_one_device, in_specs=rows, out_specs=rows, check_vma=False)(q, k, v)


def _on_one_device(q, k, v):
    from jax.experimental.pallas.ops.tpu import flash_attention as pallas  # takes a second to import

    size = q.shape[-1]
    padding = ((0, 0), (0, 0), (0, 0), (0, -size % LANES if size > LANES else 0))
    heads_first = [jnp.pad(x.swapaxes(1, 2), padding) for x in (q, k, v)]  # zeros change neither scores nor sums
    names = {field.name for field in dataclasses.fields(pallas.BlockSizes)} - {"block_b"}
    blocks = pallas.BlockSizes(block_b=1, **dict.fromkeys(names, _BLOCK))
    out = pallas.flash_attention(*heads_first, sm_scale=size**-0.5, block_sizes=blocks)
    return out[..., :size].swapaxes(1, 2)
