"""The tables of docs/hardware.md: Stable Diffusion 1.5's programs and the paper's recipe, planned for several targets.

    python -m benchmarks.plans --out=DIR                        # every row: hours of a core
    python -m benchmarks.plans --out=DIR --targets=h100-8       # some targets
    python -m benchmarks.plans --out=DIR --table                # only prints the tables of the rows that DIR has

Each row is a run of the stage `plan` in a process of its own; a row that DIR has is not compiled again.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

from instaflow_jax.infra.messages import markdown_table

FSDP = {"v5e-64": 8, "v5p-16": 1, "h100-8": 1, "v5e-8": 8}  # devices that share one copy of the training state
RECOMPUTES_NOTHING = ("h100-8",)  # targets with memory for all intermediate results
PRICES = {"h100": 2.5, "v5e": 1.2, "v5p": 4.2}  # assumed dollars for an hour of a device


@dataclasses.dataclass(frozen=True)
class Row:
    """A program on a target.

    Attributes:
      variant: of configs/plan.py.
      fields: of `config.program`.
      recipe: whether it is a part of the paper's recipe.
    """

    title: str
    variant: str
    target: str
    fields: tuple[str, ...]
    recipe: bool = False

    @property
    def name(self) -> str:
        return f"{self.variant}_{self.target}"


def training(variant: str, target: str, per_device: int, **recipe: bool) -> Row:
    """A training stage with its own global batch, in micro-batches of at most `per_device` samples a device."""
    batch = 64 if variant == "reflow_sd15" else 1024
    devices = int(target.rpartition("-")[2])
    fields = [f"fsdp={FSDP[target]}", f"accumulate={max(1, batch // (devices * per_device))}"]
    if target in RECOMPUTES_NOTHING:
        nets = ("unet", "vae", "lpips") if variant.endswith("lpips") else ("unet",)
        fields += [f"remat.{net}=none" for net in nets]
    return Row(variant, variant, target, tuple(fields), **recipe)


def recipe(target: str, per_device: int, lpips: int) -> list[Row]:
    """The paper's stages in turn: 3.2 million pairs of the teacher, two reflows, as many pairs, two distillations."""
    pairs = ("count=3200000", "batch=16")
    return [
        Row("pairs of the teacher", "generate_sd15", target, pairs, True),
        training("reflow_sd15", target, per_device, recipe=True),
        training("reflow_sd15_2", target, per_device, recipe=True),
        Row("pairs of the 2-rectified flow", "generate_rf2", target, pairs, True),
        training("distill_sd15_l2", target, per_device, recipe=True),
        training("distill_sd15_lpips", target, lpips, recipe=True),
    ]


def image(target: str, batch: int) -> Row:
    return Row(f"one-step image, batch {batch}", "sample_instaflow", target, ("dtype=bfloat16", f"batch={batch}"))


ROWS = [
    *(image(target, 1) for target in ("v5e-1", "v5p-1", "a100-1", "h100-1", "h200-1")),
    image("v6e-1", 8),
    training("distill_sd15_lpips", "v5e-8", 1),
    Row("reflow_sd15, adapters", "reflow_sd15", "h100-1", ("lora.rank=16", "batch_size=4")),
    *recipe("h100-8", per_device=32, lpips=8),
    *recipe("v5p-16", per_device=4, lpips=2),
    *recipe("v5e-64", per_device=4, lpips=2),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that keeps each row's plan")
    parser.add_argument("--targets", nargs="*", help="only these")
    parser.add_argument("--table", action="store_true", help="only print the tables")
    arguments = parser.parse_args()
    rows = [row for row in ROWS if not arguments.targets or row.target in arguments.targets]
    if not arguments.table:
        for row in rows:
            compile_row(row, arguments.out)
    print(table(rows, arguments.out))
    print(recipe_table(rows, arguments.out))


def compile_row(row: Row, out: Path) -> None:
    """Runs `plan`, unless the row is there; a row that cannot be planned is said and left out."""
    if path(row, out).is_file():
        return
    command = [sys.executable, "-m", "instaflow_jax.main", f"--config=configs/plan.py:{row.variant}"]
    command += [f"--config.target={row.target}", f"--workdir={out / row.name}"]
    print(row.name, flush=True)
    if subprocess.run(command + [f"--config.program.{field}" for field in row.fields]).returncode:
        print(f"{row.name} could not be planned", flush=True)


def path(row: Row, out: Path) -> Path:
    """The JSON file of the row's plan."""
    return out / row.name / "plan" / f"{row.variant.partition('_')[0]}_{row.target}.json"


def plans(rows: list[Row], out: Path) -> list[tuple[Row, dict]]:
    """The rows that are there, with their plans."""
    return [(row, json.loads(path(row, out).read_text())["plans"][0]) for row in rows if path(row, out).is_file()]


def table(rows: list[Row], out: Path) -> str:
    """Fit, memory, bound and compile time of each row."""
    head = ("program", "target", "settings", "fits", "arguments GiB", "temporaries GiB", "bound", "MFU at most")
    lines = []
    for row, plan in plans(rows, out):
        memory, gib = plan["memory"] or {}, 2**30
        size = [f"{memory[name] / gib:.2f}" if memory else "–" for name in ("arguments", "temporaries")]
        fits = f"{'yes' if plan['fits'] else 'no'}, of {plan['available'] / gib:.0f}"
        bound, share = f"{1000 * plan['seconds']['bound']:.3g} ms", f"{100 * plan['mfu_bound']:.0f} %"
        settings, compiled = f"`{' '.join(row.fields)}`", f"{plan['compile_seconds']:.0f} s"
        lines.append([row.title, row.target, settings, fits, *size, bound, share, compiled])
    return markdown_table((*head, "compiled in"), lines)


def recipe_table(rows: list[Row], out: Path) -> str:
    """Device-days and dollars of the recipe's stages on each target, at the bound."""
    lines = []
    for target in dict.fromkeys(row.target for row in rows if row.recipe):
        found = plans([row for row in rows if row.recipe and row.target == target], out)
        if not found:
            continue
        price = 24 * PRICES[target.partition("-")[0]]
        total = [(row.title, p["calls"], p["hours"], p["device_days"], p["device_days"] * price) for row, p in found]
        total.append(("together", 0, *(sum(column) for column in zip(*(part[2:] for part in total), strict=True))))
        for title, calls, hours, days, dollars in total:
            amounts = f"{hours:.3g}", f"{days:.3g}", f"{dollars:,.0f}"
            lines.append((title, target, f"{calls:,}" if calls else "", *amounts))
    return markdown_table(("stage", "target", "calls", "hours", "device-days", "dollars"), lines)


if __name__ == "__main__":
    main()
