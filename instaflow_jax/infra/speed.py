"""How fast, how much is left: the cost of a compiled step, MFU, and the progress line."""

import time
from typing import TextIO

import jax

# Peak of dense bf16 matrix products, FLOP/s a device, by the start of jax's device_kind (vendors' data sheets).
PEAK = {
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
    """bf16 FLOP/s of one device, or None where the table does not know it (every CPU)."""
    return next((peak for name, peak in PEAK.items() if device_kind.startswith(name)), None)


def step_flops(lowered: jax.stages.Lowered, repeats: int) -> float:
    """FLOP of one whole step on all devices, by XLA's cost analysis.

    Taken before XLA optimises, since afterwards convolutions and products hide in library calls that XLA
    counts as nothing. XLA counts the body of a loop once, hence `repeats`, the number of micro-batches.
    """
    return lowered.cost_analysis().get("flops", 0.0) * repeats


def describe(compiled: jax.stages.Compiled, flops: float, seconds: float) -> str:
    """One line on the compiled step: cost, and memory per device as XLA plans it."""
    line = f"step compiled in {seconds:.1f} s: {flops / 1e12:.4g} TFLOP a step"
    memory = compiled.memory_analysis()
    if memory is None:
        return line
    sizes = {
        "arguments": memory.argument_size_in_bytes,
        "of them updated in place": memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
    }
    return line + "; MiB per device: " + ", ".join(f"{name} {size / 2**20:.1f}" for name, size in sizes.items())


def rates(steps: int, seconds: float, samples_per_step: int, flops_per_step: float) -> dict[str, float]:
    """steps/s, samples/s, TFLOP/s of the whole run, and MFU where the device's peak is known."""
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


def clock_time(seconds: float) -> str:
    """1:02:03, or 02:03 below the hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes:02d}:{seconds:02d}"


class Progress:
    """The line that tells how training goes: rewritten in place on a terminal, else a new one now and then.

    Rates are taken between two lines, so that they follow what happens now. `file` is None in processes that
    keep quiet.
    """

    def __init__(self, *, start: int, steps: int, samples_per_step: int, flops_per_step: float, file: TextIO | None):
        self._steps = steps
        self._costs = samples_per_step, flops_per_step
        self._file = file
        self._terminal = file is not None and file.isatty()
        self._interval = 0.5 if self._terminal else 30.0
        self._began = self._told = time.monotonic()
        self._start = self._told_step = start

    def update(self, step: int, loss: float) -> dict[str, float] | None:
        """Tells of `step` if it is time to, and returns the rates it told; the last step is always told."""
        now = time.monotonic()
        if now - self._told < self._interval and step < self._steps:
            return None
        found = rates(max(step - self._told_step, 1), max(now - self._told, 1e-9), *self._costs)
        self._tell(self._line(step, loss, found, now))
        self._told, self._told_step = now, step
        return found | {"elapsed_s": now - self._began}

    def _line(self, step: int, loss: float, found: dict[str, float], now: float) -> str:
        left = (now - self._began) / (step - self._start) * (self._steps - step)
        parts = [
            f"{step}/{self._steps} ({100 * step / self._steps:.0f} %)",
            f"loss {loss:.4g}",
            f"{found['steps_per_s']:.3g} steps/s",
            f"{found['samples_per_s']:.4g} samples/s",
            f"{found['tflop_per_s']:.3g} TFLOP/s",
            *([f"MFU {100 * found['mfu']:.1f} %"] if "mfu" in found else []),
            f"{clock_time(now - self._began)} gone, {clock_time(left)} left",
        ]
        return " · ".join(parts)

    def _tell(self, line: str) -> None:
        if self._file is None:
            return
        self._file.write(f"\r\x1b[K{line}" if self._terminal else line + "\n")
        self._file.flush()

    def close(self) -> None:
        """Leaves a terminal's cursor below the line."""
        if self._terminal and self._told_step > self._start:
            self._file.write("\n")
