"""Turns a flax.nnx module into a pure `apply(params, …)` over a flat dict of named arrays.

A parameter's name is its dotted path. It equals the PyTorch key except for the last word (`kernel`, `scale` and
`embedding` stand for `weight`). Code outside `models/` does not see nnx: JAX differentiates, shards, donates and
checkpoints a flat dict directly.
"""

import dataclasses
import functools
import json
import math
import types
import typing
from collections.abc import Callable, Mapping
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
    """Base of every network's config; its fields are the keys of the reference's `config.json` that we use."""

    fixed: ClassVar[dict[str, Any]] = {}  # keys that a file may contain only with these values

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "Config":
        """Reads the known keys of a `config.json`.

        Raises:
          ValueError: a key has a value of another type, or one that this port does not support.
        """
        for key, value in cls.fixed.items():
            if key in raw and raw[key] != value:
                raise ValueError(f"config.json: {key}={raw[key]!r} is not supported; use {value!r}")
        fields = {f.name: f.type for f in dataclasses.fields(cls)}
        freeze = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items() if k in fields}
        for key, value in freeze.items():
            if not _fits(value, fields[key]):
                kind = getattr(fields[key], "__name__", "") if isinstance(fields[key], type) else ""
                raise ValueError(f"config.json: {key}={raw[key]!r} is not supported; use {kind or fields[key]}")
        return cls(**freeze)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a JSON value fits a field's annotation: bool, int, float, str, None, a union, tuple[kind, …], a config.

    Integers are at least 0, as all of these configs' are.
    """
    if isinstance(kind, types.UnionType):
        return any(_fits(value, one) for one in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_fits(one, typing.get_args(kind)[0]) for one in value)
    if kind is None or kind is types.NoneType:
        return value is None
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    if kind is float:
        return isinstance(value, (int, float))
    return isinstance(value, kind) and (kind is not int or value >= 0)


@dataclasses.dataclass(frozen=True, eq=False)
class Net:
    """A network without its weights.

    Attributes:
      config: the network's own `Config`.
      raw_config: the `config.json` it came from, from which `save_pretrained` writes back every key.
      graphdef: the module without its parameters.
      abstract: name → nnx path and abstract variable of each parameter.
      dtype: compute type.
    """

    module: type["Model"]
    config: Any
    raw_config: dict[str, Any]
    graphdef: Any
    abstract: Mapping[str, tuple[tuple, nnx.Variable]]
    dtype: Any

    @property
    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of each parameter by name."""
        return {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, (_, v) in self.abstract.items()}

    def apply(self, params: Params, *inputs, method: str = "__call__", **options):
        """Runs `method` of the module with `params`. Pure: it can be jitted, differentiated and sharded."""
        leaves = {path: variable.replace(params[name]) for name, (path, variable) in self.abstract.items()}
        module = nnx.merge(self.graphdef, nnx.from_flat_state(leaves))
        return getattr(module, method)(*inputs, **options)

    def cast(self, params: dict[str, Any]) -> dict[str, Any]:
        """Parameters, or their shapes, with kernels and embeddings in the compute type, to which each layer casts them.

        For inference, which then reads half the bytes in bfloat16; norms and biases stay as they are. Outputs are the
        same, bit for bit.
        """
        drawn = {name for name, (_, v) in self.abstract.items() if v.get_metadata(RANDOM_INIT, False)}

        def to_compute_type(value):
            shape_only = isinstance(value, jax.ShapeDtypeStruct)
            return jax.ShapeDtypeStruct(value.shape, self.dtype) if shape_only else value.astype(self.dtype)

        return {name: to_compute_type(p) if name in drawn else p for name, p in params.items()}

    def with_remat(self, remat: str) -> "Net":
        """The same network, but some parts recompute their intermediate results in the backward pass to save memory.

        Outputs and gradients stay the same, and nothing changes without a gradient.

        Args:
          remat: "none"; "attention" for the products and softmax of attention, whose memory grows with the square of
            the number of tokens (about 5 % more FLOPs in a step of SD 1.5); "blocks" for each residual block and
            transformer and, in LPIPS, each stage of the trunk (33 % more FLOPs).

        Raises:
          ValueError: `remat` is not one of these.
        """
        if remat not in REMAT:
            raise ValueError(f"remat={remat!r} is not one of {', '.join(REMAT)}")
        module = nnx.merge(self.graphdef, nnx.from_flat_state(dict(self.abstract.values())))
        for _, part in nnx.iter_modules(module):
            if isinstance(part, Remat):
                part.recompute = remat in part.remat
        return dataclasses.replace(self, graphdef=nnx.split(module)[0])

    def init(self, key: jax.Array) -> Params:
        """Fresh float32 parameters, a pure function of `key`.

        Kernels are normal with variance 1 / fan-in, embeddings normal with deviation 0.02, and everything else starts
        as its module says. All come from one long draw, since XLA takes minutes to compile a draw for each.
        """
        return jax.jit(self._init)(key)

    def _init(self, key):
        state = nnx.state(self.module(self.config, LayerFactory()))
        params = _named(state, lambda path, variable: variable[...])
        shapes = {name: v.shape for name, (_, v) in self.abstract.items() if v.get_metadata(RANDOM_INIT, False)}
        cuts = np.cumsum([math.prod(shape) for shape in shapes.values()])
        _, key = jax.random.split(key)  # keeps the parameters that each key gave in the first release
        pieces = jnp.split(jax.random.normal(key, (cuts[-1],)), cuts[:-1])
        for (name, shape), piece in zip(shapes.items(), pieces, strict=True):
            scale = math.prod(shape[:-1]) ** -0.5 if name.endswith("kernel") else 0.02
            params[name] = scale * piece.reshape(shape)
        return params

    def save_pretrained(self, params: Params, directory: str | Path, **options) -> None:
        """Writes `config.json` and weights for PyTorch diffusers or transformers; `options` are `port.save`'s.

        Beside them stands the class's PyTorch code, if these libraries do not have the class.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        port.save(params, directory, self.module.layout, **options)
        text = json.dumps(self.raw_config, indent=2, sort_keys=True) + "\n"
        files.write_text(directory / "config.json", text)
        if self.module.torch_code:
            files.write_text(
                directory / self.module.torch_code.name, self.module.torch_code.read_text(encoding="utf-8")
            )


class Model(nnx.Module):
    """Base of every network: makes a `Net` and its parameters from a config and files."""

    Config: ClassVar[type[Config]]
    layout: ClassVar[hub.Layout]
    torch_code: ClassVar[Path | None] = None  # the class for PyTorch, where the reference libraries do not have it

    @classmethod
    def from_config(
        cls, raw: dict[str, Any], *, dtype=jnp.float32, attention: str = "auto", kernels: str = "auto"
    ) -> Net:
        """The network that a `config.json` describes, without allocating its weights.

        Args:
          raw: the content of `config.json`.
          dtype, attention, kernels: compute type and choice of kernels, see `LayerFactory`.

        Raises:
          ValueError: the config or one of the options is not supported.
        """
        config = cls.Config.from_dict(raw)
        raw = {"_class_name": cls.__name__} | dataclasses.asdict(config) | raw
        graphdef, abstract = _structure(cls, config, LayerFactory(jnp.dtype(dtype), attention, kernels))
        return Net(cls, config, raw, graphdef, abstract, jnp.dtype(dtype))

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        subfolder: str = "",
        *,
        variant: str | None = None,
        dtype=jnp.float32,
        attention: str = "auto",
        kernels: str = "auto",
    ) -> tuple[Net, Params]:
        """Reads a network from a directory or hub id in diffusers or transformers layout.

        Args:
          source: a local directory, or a hub id such as "owner/name" (taken from the local cache when offline).
          subfolder: folder inside `source`, e.g. "unet".
          variant: e.g. "fp16" to read `diffusion_pytorch_model.fp16.safetensors`.
          dtype, attention, kernels: compute type and choice of kernels, see `LayerFactory`; parameters are float32.

        Returns:
          the `Net` and its parameters as numpy arrays in host memory.

        Raises:
          FileNotFoundError: a file is missing.
          ValueError: the file's config is not supported or its weights do not fit, the first offenders named.
        """
        directory = hub.find(source, subfolder, cls.layout, variant)
        raw = hub.read_config(directory, cls.__name__)
        net = cls.from_config(raw, dtype=dtype, attention=attention, kernels=kernels)
        return net, port.load(directory, net.shapes, cls.layout, variant)


@functools.lru_cache(64)
def _structure(cls: type[Model], config: Config, make: LayerFactory) -> tuple[Any, Mapping[str, tuple]]:
    """`graphdef` and `abstract` of a `Net`, kept because tracing a large network takes a second."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: cls(config, make)))
    return graphdef, types.MappingProxyType(_named(state, lambda path, variable: (path, variable)))


def _named(state, leaf: Callable) -> dict[str, Any]:
    return {".".join(map(str, path)): leaf(path, variable) for path, variable in nnx.to_flat_state(state)}


def count(params: Params) -> int:
    """Number of scalars in `params`."""
    return sum(int(np.prod(p.shape)) for p in params.values())
