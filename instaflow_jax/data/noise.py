"""X0 of a pair from (run seed, pair number) alone: the same values on every machine, device and version of JAX.

The last bits of `jax.random.normal` depend on the backend that computes the inverse error function, but a data set that
stores only seeds must be readable on other machines. So the bits come from Philox-4x64-10 (Salmon et al. 2011) with the
two numbers as its key, and Box–Muller in float64 turns them into normal numbers: processors differ only some forty
binary digits below the precision of the stored float16.
"""

import zlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float16

NAME = "philox4x64-boxmuller"


def noise(seed: int, index: int, shape: Sequence[int]) -> Float16[np.ndarray, "..."]:
    """Standard normal numbers of the given shape, rounded to float16.

    Args:
      seed: seed of the run, 0 <= seed < 2^64.
      index: number of the pair, in the same range.
      shape: shape of the result, [h, w, c].

    Raises:
      ValueError: seed or index does not fit into 64 bits.
    """
    if not (0 <= seed < 2**64 and 0 <= index < 2**64):
        raise ValueError(f"noise of seed {seed} and number {index}: use integers from 0 to {2**64 - 1}")
    count = int(np.prod(shape))
    half = -(-count // 2)
    bits = np.random.Philox(key=np.array([seed, index], np.uint64)).random_raw(2 * half)
    uniform = ((bits >> np.uint64(11)) + 0.5) * 2.0**-53
    radius, angle = np.sqrt(-2 * np.log(uniform[:half])), 2 * np.pi * uniform[half:]
    normal = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
    return normal[:count].reshape(shape).astype(np.float16)


def checksum(X0: Float16[np.ndarray, "..."]) -> int:
    """CRC-32 of the bytes, stored in place of noise that is regenerated when read."""
    return zlib.crc32(np.ascontiguousarray(X0, "<f2"))
