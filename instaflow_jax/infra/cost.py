"""Cost of a compiled step: FLOPs, memory, and the share of the device's peak that a run reaches (MFU)."""

import jax

# Peak FLOP/s of dense bf16 matrix products on one device, by prefix of jax's device_kind (vendors' data sheets).
PEAK_FLOPS = {
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100": 312e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Peak bf16 FLOP/s of one device; None for devices that are not in the table, such as CPUs."""
    return next((peak for name, peak in PEAK_FLOPS.items() if device_kind.startswith(name)), None)


def step_flops(lowered: jax.stages.Lowered, repeats: int) -> float:
    """FLOPs of one step on all devices together, by XLA's cost analysis.

    Counted before XLA optimises: afterwards convolutions and matrix products are library calls, which XLA counts as 0.
    XLA counts the body of a loop once, hence `repeats`, the number of micro-batches.
    """
    return lowered.cost_analysis().get("flops", 0.0) * repeats


def describe(compiled: jax.stages.Compiled, flops: float, seconds: float) -> str:
    """One line about the compiled step: FLOPs, and the memory per device that XLA plans."""
    line = f"step compiled in {seconds:.1f} s: {flops / 1e12:.4g} TFLOP per step"
    memory = compiled.memory_analysis()
    if memory is None:
        return line
    sizes = {
        "arguments": memory.argument_size_in_bytes,
        "of which donated": memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
    }
    return line + "; MiB per device: " + ", ".join(f"{name} {size / 2**20:.1f}" for name, size in sizes.items())


def rates(steps: int, seconds: float, samples_per_step: int, flops_per_step: float) -> dict[str, float]:
    """steps/s, samples/s and TFLOP/s of all devices together, and MFU if the device's peak is known."""
    per_second = steps / seconds
    found = {
        "steps_per_s": per_second,
        "samples_per_s": per_second * samples_per_step,
        "tflop_per_s": per_second * flops_per_step / 1e12,
    }
    peak = peak_flops(jax.devices()[0].device_kind)
    if peak is not None:
        found["mfu"] = per_second * flops_per_step / (peak * jax.device_count())
    return found
