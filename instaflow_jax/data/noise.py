"""X0 of a pair from (run seed, pair number) alone: the same numbers on every machine, device and version of JAX.

`jax.random.normal` would do on one machine, but its last bits depend on the backend that computes the inverse error
function, and a data set that keeps only seeds must be read on other machines than it was made on. So the bits are
Philox-4x64-10 (Salmon et al. 2011), keyed by the two numbers, and the normal numbers are Box and Muller's in float64:
what processors disagree about lies forty binary places below the float16 that is kept.
"""

import zlib

import numpy as np
from jaxtyping import Float16

NAME = "philox4x64-boxmuller"


def noise(seed: int, index: int, shape: tuple[int, ...]) -> Float16[np.ndarray, "..."]:
    """Standard normal numbers, rounded to float16 before anything is computed from them.

    Args:
      seed: of the run, 0 <= seed < 2^64.
      index: of the pair.
    """
    count = int(np.prod(shape))
    half = -(-count // 2)
    bits = np.random.Philox(key=np.array([seed, index], np.uint64)).random_raw(2 * half)
    uniform = ((bits >> np.uint64(11)) + 0.5) * 2.0**-53
    radius, angle = np.sqrt(-2 * np.log(uniform[:half])), 2 * np.pi * uniform[half:]
    normal = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
    return normal[:count].reshape(shape).astype(np.float16)


def checksum(X0: Float16[np.ndarray, "..."]) -> int:
    """CRC-32 of the bytes, kept in place of noise that is to be drawn again."""
    return zlib.crc32(np.ascontiguousarray(X0, "<f2"))
