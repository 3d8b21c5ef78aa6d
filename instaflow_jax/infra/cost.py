"""Cost of a program: FLOPs from its jaxpr, memory as XLA plans it, and the devices' peaks, which give MFU."""

import dataclasses
import math

import jax
from jax.extend import core as jaxpr_core

Jaxpr = jaxpr_core.Jaxpr | jaxpr_core.ClosedJaxpr


@dataclasses.dataclass(frozen=True)
class Peak:
    """What one device, as jax counts devices, can do at most (vendors' data sheets).

    Attributes:
      flops: FLOP/s of dense bf16 matrix products that add in float32.
      bandwidth: bytes/s of its memory.
      memory: bytes.
    """

    flops: float
    bandwidth: float
    memory: float


GIB = 2**30
PEAKS = {  # by prefix of jax's device_kind; the longer prefixes come first. Memory as the driver reports it.
    "NVIDIA B200": Peak(2250e12, 8.0e12, 178 * GIB),
    "NVIDIA H200": Peak(989e12, 4.8e12, 140 * GIB),
    "NVIDIA H100 PCIe": Peak(756e12, 2.0e12, 79 * GIB),
    "NVIDIA H100 NVL": Peak(835e12, 3.9e12, 93 * GIB),
    "NVIDIA H100": Peak(989e12, 3.35e12, 79 * GIB),
    "NVIDIA A100-SXM4-40GB": Peak(312e12, 1.555e12, 39 * GIB),
    "NVIDIA A100-PCIE-40GB": Peak(312e12, 1.555e12, 39 * GIB),
    "NVIDIA A100": Peak(312e12, 2.039e12, 79 * GIB),
    "NVIDIA L40S": Peak(362e12, 0.864e12, 44 * GIB),
    "NVIDIA L4": Peak(121e12, 0.3e12, 22 * GIB),
    "NVIDIA A10G": Peak(70e12, 0.6e12, 22 * GIB),
    "NVIDIA GeForce RTX 4090": Peak(165e12, 1.008e12, 24 * GIB),
    "TPU v4": Peak(275e12, 1.228e12, 32 * GIB),  # a chip, whose two cores are one device (megacore)
    "TPU v5 lite": Peak(197e12, 0.819e12, 16 * GIB),
    "TPU v5e": Peak(197e12, 0.819e12, 16 * GIB),
    "TPU v5": Peak(459e12, 2.765e12, 95 * GIB),  # v5p
    "TPU v6": Peak(918e12, 1.64e12, 32 * GIB),
    "TPU7x": Peak(1153.5e12, 3.69e12, 96 * GIB),  # a chip is two devices
}


def peak(device_kind: str) -> Peak | None:
    """The peaks of one device; None for devices that are not in the table, such as CPUs."""
    return next((found for name, found in PEAKS.items() if device_kind.startswith(name)), None)


# ---------------------------------------------------------------- FLOPs


def count_flops(jaxpr: Jaxpr) -> float:
    """FLOPs of all matrix products and convolutions in a jaxpr, on all devices together.

    Counts the arithmetic of the method and not the way a device does it: a kernel chosen for a platform counts like
    the default, a loop as often as it runs. Values that `jax.checkpoint` computes again count again; see `recomputes`.
    """
    return sum(map(_flops, getattr(jaxpr, "jaxpr", jaxpr).eqns))


def recomputes(jaxpr: Jaxpr) -> bool:
    """Whether a jaxpr has parts that `jax.checkpoint` computes twice."""
    equations = getattr(jaxpr, "jaxpr", jaxpr).eqns
    return any("prevent_cse" in e.params or any(map(recomputes, _called(e))) for e in equations)


def _called(eqn) -> list[Jaxpr]:
    """The jaxprs that an equation calls; where the platform chooses one, the default."""
    if eqn.params.get("branches_platforms"):
        return [eqn.params["branches"][-1]]
    found = []
    for value in eqn.params.values():
        found += [v for v in (value if isinstance(value, (tuple, list)) else (value,)) if isinstance(v, Jaxpr)]
    return found


def _flops(eqn) -> float:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = eqn.invars[0].aval.shape
        return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)
    if name == "conv_general_dilated":  # of a dilated (transposed) convolution's sums only those that are not all 0
        kernel, out_axis = eqn.invars[1].aval.shape, params["dimension_numbers"].rhs_spec[0]
        sums = math.prod(eqn.outvars[0].aval.shape) / math.prod(params["lhs_dilation"])
        return 2.0 * sums * math.prod(kernel) / kernel[out_axis]
    counts = list(map(count_flops, _called(eqn)))
    if name == "cond":
        return max(counts)
    times = {"scan": lambda: params["length"], "shard_map": lambda: params["mesh"].size}.get(name, lambda: 1)()
    return times * sum(counts)


# ---------------------------------------------------------------- what a compiled program takes


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each device, as XLA plans them: inputs, results that are not donated inputs, and everything between."""

    arguments: int
    outputs: int
    temporaries: int

    @property
    def total(self) -> int:
        """An upper bound of the peak: everything at once."""
        return self.arguments + self.outputs + self.temporaries


def memory(compiled: jax.stages.Compiled) -> Memory | None:
    """What XLA plans; None if the platform does not say."""
    found = compiled.memory_analysis()
    if found is None:
        return None
    outputs = found.output_size_in_bytes - found.alias_size_in_bytes
    return Memory(found.argument_size_in_bytes, outputs, found.temp_size_in_bytes)


def describe(compiled: jax.stages.Compiled, flops: float, seconds: float) -> str:
    """One line about the compiled step: FLOPs, and the memory per device that XLA plans."""
    line = f"step compiled in {seconds:.1f} s: {flops / 1e12:.4g} TFLOP per step"
    planned = memory(compiled)
    if planned is None:
        return line
    sizes = ", ".join(f"{name} {size / 2**20:.1f}" for name, size in dataclasses.asdict(planned).items())
    return f"{line}; MiB per device: {sizes}"


def rates(steps: int, seconds: float, samples_per_step: int, flops_per_step: float) -> dict[str, float]:
    """steps/s, samples/s and TFLOP/s of all devices together, and MFU if the device's peak is known."""
    per_second = steps / seconds
    found = {
        "steps_per_s": per_second,
        "samples_per_s": per_second * samples_per_step,
        "tflop_per_s": per_second * flops_per_step / 1e12,
    }
    best = peak(jax.devices()[0].device_kind)
    if best is not None:
        found["mfu"] = per_second * flops_per_step / (best.flops * jax.device_count())
    return found
