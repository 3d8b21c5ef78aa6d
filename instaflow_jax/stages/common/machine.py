"""The hardware and the version of JAX that seconds were measured with."""

import platform
from pathlib import Path
from typing import Any

import jax


def machine() -> dict[str, Any]:
    """The device's name (on a CPU the processor's), the number of devices, and the version of JAX."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind if device.platform != "cpu" else _processor(),
        "devices": jax.device_count(),
        "jax": jax.__version__,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"CPU {names[0] if names else platform.processor() or platform.machine()}"
