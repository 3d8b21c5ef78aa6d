"""Attention by blocks of queries, so that the scores of a block stay in the CPU's cache."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

from instaflow_jax.arrays import AnyArray

BLOCK = 256  # queries per block
MIN_QUERIES = 1024


def blocks_pay(q) -> bool:
    """Whether `attention_by_blocks` is the CPU's way for queries [B, L, heads, D]."""
    return q.dtype == jnp.float32 and q.shape[1] >= MIN_QUERIES and q.shape[1] % BLOCK == 0


def attention_by_blocks(
    q: Float[AnyArray, "B L heads D"], k: Float[AnyArray, "B M heads D"], v: Float[AnyArray, "B M heads D"]
) -> Float[AnyArray, "B L heads D"]:
    """softmax(q kᵀ / √D) v, one head and `BLOCK` queries at a time; `BLOCK` must divide L."""
    batch, length, heads, width = q.shape
    queries = (q * width**-0.5).reshape(batch, -1, BLOCK, heads, width)

    def one_head(inputs):
        queries, k, v = inputs

        def one_block(q):
            scores = q @ k
            weights = jnp.exp(scores - lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
            return (weights @ v) / jnp.sum(weights, axis=-1, keepdims=True)

        return lax.map(jax.checkpoint(one_block), queries)

    out = lax.map(one_head, (queries.transpose(3, 1, 0, 2, 4), k.transpose(2, 0, 3, 1), v.transpose(2, 0, 1, 3)))
    return out.transpose(2, 1, 3, 0, 4).reshape(batch, length, heads, width)
