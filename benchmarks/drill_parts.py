"""What the drill runs, each part in a process of its own:

    python -m benchmarks.drill_parts FUNCTION SIZE FOLDER RESULT [ARGUMENT ...]

SIZE is "card" or "dry", FOLDER keeps what the compiler and the stages write, RESULT is the JSON file to write.
"""

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks import run, sizes
from benchmarks.sizes import Size
from benchmarks.table import machine, versions
from instaflow_jax.infra.files import read_json, write_json

Result = dict[str, Any]
SIZES = {"card": sizes.CARD, "dry": sizes.DRY}
DEVICES = 8  # of the programs that are only compiled


def card(size: Size, folder: Path) -> Result:
    """What the card is, its target configuration as XLA writes it, and what it reaches in a product and a copy."""
    import jax
    import jax.numpy as jnp

    n = 8192 if size is sizes.CARD else 64
    a = jax.random.normal(jax.random.key(0), (n, n), jnp.bfloat16)
    big = jnp.ones((n, 8 * n), jnp.float32)
    found = {
        "machine": machine("gpu" if size.device == "cuda" else "cpu"),
        "versions": versions(),
        "device_kind": jax.devices()[0].device_kind,
        "matmul_flops": 2 * n**3 / seconds(lambda x: x @ x, a),
        "copy_bytes": 2 * big.nbytes / seconds(lambda x: x + 1, big),
    }
    texts = sorted(folder.rglob("*gpu_target_config.pbtxt"))
    return found | {"target_config": texts[0].read_text() if texts else ""}


def seconds(function, x) -> float:
    """Median of ten runs of a compiled function."""
    import jax

    compiled, found = jax.jit(function), []
    for _ in range(12):
        start = time.perf_counter()
        jax.block_until_ready(compiled(x))
        found.append(time.perf_counter() - start)
    return sorted(found[2:])[5]


def parity(size: Size, folder: Path, network: str) -> Result:
    """One network in float32 and bfloat16 beside PyTorch in both, against PyTorch in float64."""
    from benchmarks.parity import LIMIT, NETWORKS, Setting

    row = NETWORKS[network](Setting(size.configs, size.latent, size.device, bf16=True))
    exact = row["ours64"] <= max(LIMIT, 2 * row["torch64"])
    return {"parity": row | {"agrees": exact and row["ours_bf16"] <= 2 * row["torch_bf16"]}}


def timing(size: Size, folder: Path, group: str) -> Result:
    """A group of the GPU suite; "error" if a side ended."""
    rows, failed = run.measure(group, run.gpu(size.compiled, size)[group], size.repeats)
    found = {"rows": [dataclasses.asdict(row) for row in rows]}
    if not (rows or failed):
        failed = [f"{group}: the sides have no title in common"]
    return found | ({"error": "; ".join(failed)} if failed else {})


def eight(size: Size, folder: Path, variant: str) -> Result:
    """The training step of `configs/plan.py:variant` for eight devices, compiled on one card or on the CPU."""
    import jax

    from configs import plan
    from instaflow_jax.infra.cost import Peak, peak
    from instaflow_jax.stages.plan import stage
    from instaflow_jax.stages.plan.targets import Target

    if size is sizes.CARD:
        # Eight hosts of one card each: the number of cards a host must be that of this machine.
        jax.config.update("jax_mock_gpu_topology", f"1x{DEVICES}x1")
    else:
        jax.config.update("jax_num_cpu_devices", DEVICES)
    config, devices, shapes = plan.get_config(variant), jax.devices(), "sd15"
    if size is not sizes.CARD:
        shapes = str(folder / "model")
        for name, fields in size.configs.items():
            (folder / "model" / name).mkdir(parents=True)
            write_json(folder / "model" / name / "config.json", fields)
    with config.program.unlocked():
        config.program.update({"fsdp": DEVICES, "dtype": size.dtype})
    best = peak(devices[0].device_kind) or Peak(1e12, 1e11, 2**34)
    target = Target(f"{DEVICES} × {devices[0].device_kind}", devices, best, {})
    with mock.patch.object(jax, "process_count", return_value=1):  # the mock's hosts would multiply the batch
        found = stage.measure(config.program, shapes, target, config.optimization_level)
    return {"table": stage.table([found]), "plan": dataclasses.asdict(found)}


def demo(size: Size, folder: Path) -> Result:
    """The embedded demo from pairs to report, without TensorBoard; a dry run only makes its checks."""
    workdir, data = folder / "demo", Path(os.environ.get("WHEELS", "nowhere")) / "data"
    options = [f"--config.{name}.tensorboard=false" for name in ("reflow", "distill", "direct")]
    options += [f"--config.evaluate.data_dir={data}"] if data.is_dir() else []
    options += ["--config.check=true"] if size is sizes.DRY else []
    command = [sys.executable, "-m", "instaflow_jax.main", "--config=configs/demo.py", f"--workdir={workdir}"]
    done = subprocess.run([*command, *options], check=False)
    if done.returncode:
        return {"error": f"the demo ended with {done.returncode}"}
    if size is sizes.DRY:
        return {"demo": []}
    columns = ("model", "N", "seconds", "fd_emoji", "fd_kinds", "clip_score")
    rows = read_json(workdir / "evaluate" / "results.json")["rows"]
    return {"demo": [{name: row.get(name) for name in columns} for row in rows]}


def main(function: str, size: str, folder: str, result: str, *arguments: str) -> None:
    functions = {f.__name__: f for f in (card, parity, timing, eight, demo)}
    write_json(result, functions[function](SIZES[size], Path(folder), *arguments))


if __name__ == "__main__":
    main(*sys.argv[1:])
