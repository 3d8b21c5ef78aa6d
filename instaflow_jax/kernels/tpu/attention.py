"""Flash attention on TPUs: jax's Pallas kernel "splash", which keeps the L × L scores in the chip's fast memory."""

import dataclasses

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Float

from instaflow_jax.arrays import AnyArray

MIN_TOKENS = 1024  # below, the scores are small, and XLA's attention reads and writes less
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
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # takes a second to import

    length, heads, size = q.shape[1:]
    # Tokens along the lanes, of which a vector register has 128: heads of 40 would leave two thirds of them empty.
    layouts = dict.fromkeys(("q_layout", "k_layout", "v_layout"), splash.QKVLayout.SEQ_MINOR)
    block = _BLOCK if size * q.dtype.itemsize <= 1024 else _BLOCK // 2  # the VAE's heads of 512 in float32
    names = [field.name for field in dataclasses.fields(splash.BlockSizes) if field.name.startswith("block_")]
    attend = splash.make_splash_mha(
        splash.MultiHeadMask([splash.FullMask((length, length))] * heads),
        block_sizes=splash.BlockSizes(**dict.fromkeys(names, block), **layouts),
        head_shards=1,
        q_seq_shards=1,
    )
    heads_first = (x.swapaxes(1, 2) for x in ((q * size**-0.5).astype(q.dtype), k, v))
    return jax.vmap(attend)(*heads_first).swapaxes(1, 2)
