"""Training of adapters alone (`config.lora`): what is trained, and how a run finds the model they belong to again."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jaxtyping import PyTree
from ml_collections import ConfigDict

from instaflow_jax.arrays import Key, Params
from instaflow_jax.infra import checkpoint, devices, files
from instaflow_jax.infra.stores import CHECKPOINTS
from instaflow_jax.models.net import Net
from instaflow_jax.pipeline import Pipeline
from instaflow_jax.stages.common import fit
from instaflow_jax.train import lora
from instaflow_jax.train.lora import BASE, Lora
from instaflow_jax.train.step import Loss


class Trained(NamedTuple):
    """What a run trains: all weights of its network, or adapters.

    Attributes:
      options: whose config, for the checkpoints, names the model that adapters belong to.
      init: initial parameters, or a function that draws them.
      loss: of these parameters; a tuple of losses where two networks are trained.
      frozen: inputs of the loss that are not trained.
      sharded: the entries of `frozen` that are sharded as parameters are.
      complete: parameters on the host → the network's weights.
      cast: of parameters and of the entries `sharded`, see `make_cast`.
    """

    options: fit.TrainOptions
    init: PyTree | Callable[[Key], PyTree]
    loss: Loss | tuple[Any, ...]
    frozen: Mapping[str, Any]
    sharded: tuple[str, ...]
    complete: Callable[[Params], Params]
    cast: devices.Cast


def read_lora(config: ConfigDict) -> Lora | None:
    """The block `configs/reflow.py:lora`; None if it is off.

    Raises:
      ValueError: naming the field, its value and the rule.
    """
    if config.rank is None:
        if config.alpha is not None or config.ranks:
            raise ValueError(
                f"config.lora.alpha={config.alpha} and config.lora.ranks={tuple(config.ranks)} have no effect without "
                "config.lora.rank; set that too"
            )
        return None
    alpha = config.rank if config.alpha is None else config.alpha
    return Lora(config.rank, float(alpha), tuple(config.targets), tuple(_read_rank(entry) for entry in config.ranks))


def _read_rank(entry: str) -> tuple[str, int]:
    pattern, _, rank = entry.rpartition("=")
    if not pattern or not rank.isascii() or not rank.isdigit() or not 0 < int(rank) < 2**31:
        raise ValueError(f"config.lora.ranks: {entry!r} is not PATTERN=RANK with a rank of at least 1, as in 'to_k=8'")
    return pattern, int(rank)


def prepare(
    options: fit.TrainOptions,
    adapters: Lora | None,
    directory: Path,
    source: str,
    pipe: Pipeline,
    start: Params,
    loss: Loss,
    frozen: Mapping[str, Any],
) -> Trained:
    """What a run in `directory` trains.

    Args:
      source: where `pipe` was loaded from.
      start: the weights of its UNet to start from, after a warm start.
      loss: of all weights of the UNet.
      frozen: inputs of the loss that are not trained.

    Raises:
      ValueError: a pattern matches no layer, or the run in `directory` is of another model.
    """
    net = pipe.nets["unet"]
    if adapters is None:
        return Trained(options, start, loss, frozen, (), lambda params: params, make_cast(None, net))
    ranks = lora.find_ranks(adapters, net.shapes)
    return Trained(
        with_base(options, directory, source, {BASE: pipe.params["unet"]}),
        functools.partial(lora.init, ranks=ranks, shapes=net.shapes),
        lora.adapt(loss, adapters.alpha, BASE, {}),
        {**frozen, BASE: devices.shard(lora.freeze(net, start, ranks), devices.make_mesh(fsdp=options.fsdp))},
        (BASE,),
        functools.partial(lora.merge, start, alpha=adapters.alpha),
        make_cast(adapters, net),
    )


def make_cast(adapters: Lora | None, *nets: Net) -> devices.Cast:
    """Casts what is trained to the types in which the layers of any of these networks use it.

    Adapters and their kernels keep theirs, because their sum is made in float32; so do names that are of none of these
    networks, such as a head's.
    """
    if adapters:
        return devices.keep
    return lambda params: functools.reduce(lambda params, net: net.cast(params), nets, params)


# ---------------------------------------------------------------- the model that adapters belong to


def with_base(
    options: fit.TrainOptions, directory: Path, source: str, weights: Mapping[str, Params]
) -> fit.TrainOptions:
    """Options whose config says which weights the adapters belong to: their hashes, `source`, and where that is within
    the workdir, so that the workdir can be moved.

    Args:
      weights: as they were loaded: a warm start may round otherwise on another machine. By "base" those of the network
        that is exported, by another name those of a second network.

    Raises:
      ValueError: the run in `directory` was begun from other weights, unless config.resume is "force".
    """
    workdir, place = directory.parent, Path(source)
    within = str(place.relative_to(workdir)) if place.is_relative_to(workdir) and place.exists() else ""
    base = {"model": source, "within": within}
    base["sha256"] = {name: files.sha256_of_params(params) for name, params in weights.items()}
    saved = directory / CHECKPOINTS
    if checkpoint.complete_steps(saved) and options.resume != "force":
        there = dict(checkpoint.load_config(saved, step=None).get("lora") or {}).get(BASE)
        if not there or there["sha256"] != base["sha256"]:
            begun = f"adapters of other weights ({there['model']})" if there else "all weights"
            raise ValueError(
                f"{directory} holds a run that trains {begun}, not adapters of the present weights of {source}: use "
                "another --workdir or config.output, or that run's own settings"
            )
    lora_fields = {**options.config["lora"], BASE: base}
    return dataclasses.replace(options, config={**options.config, "lora": lora_fields})


def find_base(run: Path, saved: Mapping[str, Any]) -> str | None:
    """The model that the adapters of a run with this config belong to; None if it trained all weights."""
    base = saved.get("lora", {}).get(BASE)
    if not base:
        return None
    return str(run.parent / base["within"]) if base["within"] else base["model"]


def check_base(run: Path, saved: Mapping[str, Any], loaded: Params) -> None:
    """Raises ValueError if the adapters of a run with this config belong to other weights than those `loaded`."""
    if files.sha256_of_params(loaded) != saved["lora"][BASE]["sha256"][BASE]:
        raise ValueError(
            f"{run} holds adapters of {saved['lora'][BASE]['model']}, whose weights have changed since: put back that "
            "model, or train again"
        )


def shapes(adapters: Lora, net: Net) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and types of a network's adapters by name. Raises ValueError as `lora.find_ranks`."""
    draw = functools.partial(lora.init, ranks=lora.find_ranks(adapters, net.shapes), shapes=net.shapes)
    return jax.eval_shape(draw, jax.random.key(0))


def read_saved_lora(saved: Mapping[str, Any]) -> Lora:
    """The adapters of a run with this config."""
    lora_fields = ConfigDict({name: value for name, value in saved["lora"].items() if name != BASE})
    found = read_lora(lora_fields)
    assert found
    return found
