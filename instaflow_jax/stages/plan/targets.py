"""The machines that `plan` compiles for, by name: "v5e-8" is 8 TPU v5e chips, "h100-8" 8 cards.

Their devices come from the compilers alone: libtpu holds the TPU's, jax's CUDA plugin the GPU's. Nothing can be run on
them.
"""

import dataclasses
import importlib.util
import os
from typing import Any

import jax
from jax.experimental import topologies

from instaflow_jax.infra.cost import Peak, peak

_SQUARE = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8"}
_CUBE = {1: "1x1x1", 4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4"}
_MEGACORE = {"chip_config_name": "megacore"}  # the two cores of a chip are one device
_TPUS: dict[str, tuple[dict[int, str], dict[str, Any]]] = {  # family → topologies by number of chips, and options
    "v4": (_CUBE, _MEGACORE),
    "v5e": (_SQUARE, {}),
    "v5p": (_CUBE, {}),
    "v6e": (_SQUARE, {}),
    "tpu7x": (_CUBE, {}),
}


@dataclasses.dataclass(frozen=True)
class _Card:
    """What XLA asks of a GPU that is not there; figures from the vendor's data sheet and programming guide."""

    kind: str
    capability: int
    cores: int
    shared_memory: int
    l2_cache: int
    clock_ghz: float


_HOPPER = {"capability": 9, "cores": 132, "shared_memory": 233472, "l2_cache": 52428800, "clock_ghz": 1.98}
_CARDS = {
    "a100": _Card("NVIDIA A100-SXM4-80GB", 8, 108, 167936, 41943040, 1.41),
    "h100": _Card("NVIDIA H100 80GB HBM3", **_HOPPER),
    "h200": _Card("NVIDIA H200", **_HOPPER),
}
_CARD_COUNTS = (1, 2, 4, 8)
_CUDA_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")  # jax's packages for NVIDIA cards; one is enough
_LIBTPU = {  # do not look for this machine's TPU, nor warn that there is none; let several processes compile
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices that only compile.

    Attributes:
      name: as the user wrote it.
      devices: in the topology's order; more than chips where a chip is two devices (tpu7x).
      peak: of one device.
      options: for the compiler.
    """

    name: str
    devices: list[jax.Device]
    peak: Peak
    options: dict[str, Any]


def names() -> list[str]:
    """Every target."""
    tpus = [f"{family}-{chips}" for family, (sizes, _) in _TPUS.items() for chips in sizes]
    return tpus + [f"{card}-{count}" for card in _CARDS for count in _CARD_COUNTS]


def check(name: str) -> None:
    """Raises ValueError if there is no such target, or its compiler is not installed."""
    if name not in names():
        raise ValueError(f"config.target={name!r} is not one of {', '.join(names())} (chips or cards after the hyphen)")
    family = name.rpartition("-")[0]
    packages, extra = (("libtpu",), "plan-tpu") if family in _TPUS else (_CUDA_PLUGINS, "gpu")
    if not any(importlib.util.find_spec(package) for package in packages):
        raise ValueError(
            f"config.target={name!r} needs the compiler in the package {packages[0]!r}, which is not installed; use "
            f"pip install -e '.[{extra}]'"
        )


def find(name: str) -> Target:
    """The devices of a target. Raises ValueError, see `check`."""
    check(name)
    family, _, count = name.rpartition("-")
    if family in _TPUS:
        os.environ |= _LIBTPU
        sizes, options = _TPUS[family]
        bounds, compiler = (1, 1, 1) if count == "1" else (2, 2, 1), {}
        found = topologies.get_topology_desc(
            f"{family}:{sizes[int(count)]}", platform="tpu", chips_per_host_bounds=bounds, **options
        )
    else:
        found = topologies.get_topology_desc(
            platform="cuda", topology=f"1x1x{count}", target_config=_describe(_CARDS[family])
        )
        # Autotuning would run kernels.
        compiler = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
    devices = list(found.devices)
    return Target(name, devices, _peak(devices[0].device_kind), compiler)


def _peak(kind: str) -> Peak:
    found = peak(kind)
    assert found is not None, f"no peak of {kind!r} in infra/cost.py"
    return found


def _describe(card: _Card) -> str:
    """XLA's target configuration of a card, in its text form."""
    best, largest = _peak(card.kind), 2**31 - 1
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: {card.shared_memory}
  shared_memory_per_block_optin: {card.shared_memory - 1024}
  core_count: {card.cores} fpus_per_core: {128 if card.capability >= 9 else 64} clock_rate_ghz: {card.clock_ghz}
  block_dim_limit_x: {largest} block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {best.bandwidth:.0f} device_memory_size: {best.memory:.0f} l2_cache_size: {card.l2_cache}
  cuda_compute_capability {{ major: {card.capability} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
runtime_version {{ major: 12 minor: 8 }}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 7 }}
device_description_str: "{card.kind}"
"""
