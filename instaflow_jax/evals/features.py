"""Networks over many pictures: every device of this process, full batches, and results that come back as one array."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PyTree, UInt8

from instaflow_jax.models.inception import InceptionV3

# function(weights, images uint8 [B, H, W, 3]) → [B, D], and its weights
FeatureNet = tuple[Callable[..., Array], PyTree]


class Spread:
    """`function(fixed, *rows)`, compiled once for full batches and run on every device of this process.

    Each device runs the same program on rows of its own: a row's arithmetic does not depend on how many devices there
    are. `rows` is what one call takes.
    """

    def __init__(self, function: Callable[..., Array], fixed: PyTree, per_device: int):
        """
        Args:
          function: pure; gives an array [b, ...] for arrays [b, ...].
          fixed: the same for all rows (weights, ...); placed on every device.
          per_device: rows of a device and call.
        """
        devices = jax.local_devices()
        mesh = jax.make_mesh((len(devices),), ("data",), devices=devices, axis_types=(AxisType.Auto,))
        whole, self._split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
        self.rows = per_device * len(devices)
        self._fixed = jax.device_put(fixed, whole)

        def program(fixed, rows):
            return function(fixed, *rows)

        self._program = jax.jit(
            jax.shard_map(
                program, mesh=mesh, in_specs=(whole.spec, self._split.spec), out_specs=self._split.spec, check_vma=False
            )
        )

    def __call__(self, *arrays: np.ndarray) -> np.ndarray:
        """The results of all rows, [N, ...] from arrays [N, ...]; what a call is short of is filled up and cut off."""
        outputs = []
        for start in range(0, len(arrays[0]), self.rows):
            rows = [array[start : start + self.rows] for array in arrays]
            count = len(rows[0])
            full = [np.resize(array, (self.rows, *array.shape[1:])) for array in rows]
            outputs.append(np.asarray(self._program(self._fixed, jax.device_put(full, self._split)))[:count])
        return np.concatenate(outputs)


def load_inception(path: str | Path) -> FeatureNet:
    """FID's features of pictures in bytes, from pytorch-fid's weight file.

    Raises:
      FileNotFoundError: no such file; says where it is to be had.
      ValueError: its weights are not this network's.
    """
    check_inception(path)
    net, params = InceptionV3.from_file(path)
    return lambda params, images: inception_features(net, params, images), params


def inception_features(net, params, images: UInt8[Array, "B H W 3"]) -> Float[Array, "B 2048"]:
    """Bytes to [0, 1], as the FID's network takes them."""
    return net.apply(params, images.astype(jnp.float32) / 255)


def check_inception(path: str | Path) -> None:
    """FileNotFoundError, saying where the file is to be had, unless it is there."""
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"{path} is missing: the FID needs pytorch-fid's weights, pt_inception-2015-12-05-6726825d.pth, from "
            "https://github.com/mseitzer/pytorch-fid/releases/tag/fid_weights"
        )
