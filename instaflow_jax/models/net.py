"""The seam: a flax.nnx module becomes a pure `apply(params, …)` over a flat dict of named arrays.

A parameter's name is its dotted path, equal to the PyTorch key but for the last word (`kernel`, `scale` and
`embedding` stand for `weight`). Outside `models/` nobody sees nnx: a flat dict differentiates, shards, donates and
checkpoints as it is.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from instaflow_jax.arrays import Params
from instaflow_jax.infra import files
from instaflow_jax.models.layers import RANDOM_INIT, REMAT, LayerFactory, Remat
from instaflow_jax.weights import hub, port


@dataclasses.dataclass(frozen=True)
class Config:
    """Base of every network's config: the fields are the keys of the reference's `config.json` that we use."""

    fixed: ClassVar[dict[str, Any]] = {}  # keys a file may hold, but only with these values

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "Config":
        """Takes the known keys of a `config.json`.

        Raises:
          ValueError: a key asks for something this port does not have.
        """
        for key, value in cls.fixed.items():
            if key in raw and raw[key] != value:
                raise ValueError(f"config.json: {key}={raw[key]!r} is not supported; this port has only {value!r}")
        fields = {f.name for f in dataclasses.fields(cls)}
        freeze = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items() if k in fields}
        return cls(**freeze)


@dataclasses.dataclass(frozen=True, eq=False)
class Net:
    """A network without its weights.

    Attributes:
      config: the network's own `Config`.
      raw_config: the `config.json` it came from, kept so that `save_pretrained` writes back every key.
      shapes: name → shape and dtype of each parameter.
    """

    module: type["Model"]
    config: Any
    raw_config: dict[str, Any]
    graphdef: Any
    abstract: dict[str, tuple[tuple, nnx.Variable]]

    @property
    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, (_, v) in self.abstract.items()}

    def apply(self, params: Params, *inputs, method: str = "__call__", **options):
        """Runs `method` of the module with `params`; pure, so it may be jitted, differentiated and sharded."""
        leaves = {path: variable.replace(params[name]) for name, (path, variable) in self.abstract.items()}
        module = nnx.merge(self.graphdef, nnx.from_flat_state(leaves))
        return getattr(module, method)(*inputs, **options)

    def with_remat(self, kind: str) -> "Net":
        """The same network, which computes some parts again in the backward pass rather than keep what they made.

        Outputs and gradients stay the same, and nothing changes where no gradient is taken.

        Args:
          kind: "none"; "attention", the products and softmax of attention, whose memory grows with the square of the
            tokens (about a twentieth more work in a step of SD 1.5); "blocks", each residual block and transformer and,
            in LPIPS, each stage of the trunk (a third more work).

        Raises:
          ValueError: another kind.
        """
        if kind not in REMAT:
            raise ValueError(f"remat={kind!r} is not one of {', '.join(REMAT)}")
        module = nnx.merge(self.graphdef, nnx.from_flat_state(dict(self.abstract.values())))
        for _, part in nnx.iter_modules(module):
            if isinstance(part, Remat):
                part.recompute = kind in part.remat
        return dataclasses.replace(self, graphdef=nnx.split(module)[0])

    def init(self, key: jax.Array) -> Params:
        """Fresh float32 parameters, a pure function of `key`.

        Kernels are normal with variance 1 / fan-in and embeddings with deviation 0.02, cut from one long draw (a draw
        for each would take XLA minutes to compile); everything else starts as its module says.
        """
        return jax.jit(self._init)(key)

    def _init(self, key):
        state = nnx.state(self.module(self.config, LayerFactory()))
        params = _named(state, lambda path, variable: variable[...])
        drawn = {name: v.shape for name, (_, v) in self.abstract.items() if v.get_metadata(RANDOM_INIT, False)}
        cuts = np.cumsum([math.prod(shape) for shape in drawn.values()])
        _, draw = jax.random.split(key)  # so that a key gives what it always gave
        pieces = jnp.split(jax.random.normal(draw, (cuts[-1],)), cuts[:-1])
        for (name, shape), piece in zip(drawn.items(), pieces, strict=True):
            scale = math.prod(shape[:-1]) ** -0.5 if name.endswith("kernel") else 0.02
            params[name] = scale * piece.reshape(shape)
        return params

    def save_pretrained(self, params: Params, directory: str | Path, **options) -> None:
        """Writes `config.json` and weights as PyTorch diffusers / transformers read them; see `port.save`."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        port.save(params, directory, self.module.layout, **options)
        with files.atomic_write(directory / "config.json") as temporary:
            temporary.write_text(json.dumps(self.raw_config, indent=2, sort_keys=True) + "\n")


class Model(nnx.Module):
    """Base of every network: how its class, config and files become a `Net` and its parameters."""

    Config: ClassVar[type[Config]]
    layout: ClassVar[hub.Layout]

    @classmethod
    def from_config(cls, raw: dict[str, Any], *, dtype=jnp.float32, attention: str = "xla") -> Net:
        """The network a `config.json` describes, without allocating its weights."""
        config = cls.Config.from_dict(raw)
        raw = {"_class_name": cls.__name__} | dataclasses.asdict(config) | raw
        module = nnx.eval_shape(lambda: cls(config, LayerFactory(jnp.dtype(dtype), attention)))
        graphdef, state = nnx.split(module)
        return Net(cls, config, raw, graphdef, _named(state, lambda path, variable: (path, variable)))

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        subfolder: str = "",
        *,
        variant: str | None = None,
        dtype=jnp.float32,
        attention: str = "xla",
    ) -> tuple[Net, Params]:
        """Reads a network from a directory or hub id in diffusers / transformers layout.

        Args:
          source: a local directory, or a hub id such as "owner/name" (taken from the local cache when offline).
          subfolder: folder inside it, e.g. "unet".
          variant: e.g. "fp16" to read `diffusion_pytorch_model.fp16.safetensors`.
          dtype: compute type; the parameters themselves come as float32.
          attention: "xla" or "cudnn".

        Returns:
          the `Net`, and its parameters as numpy arrays (host memory; shard or `device_put` them as you like).

        Raises:
          FileNotFoundError, ValueError: with the file and every offending weight named.
        """
        directory = hub.find(source, subfolder, cls.layout, variant)
        net = cls.from_config(hub.read_config(directory, cls.__name__), dtype=dtype, attention=attention)
        return net, port.load(directory, net.shapes, cls.layout, variant)


def _named(state, leaf: Callable) -> dict[str, Any]:
    return {".".join(map(str, path)): leaf(path, variable) for path, variable in nnx.to_flat_state(state)}


def count(params: Params) -> int:
    """Number of scalars in `params`."""
    return sum(int(np.prod(p.shape)) for p in params.values())
