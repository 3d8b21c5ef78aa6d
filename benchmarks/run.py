"""Speed and memory beside the peers, in one table.

    python -m benchmarks.run --suite=cpu [--only=sd15,training] [--repeats=5] [--compile] [--huge_pages] [--out=FILE.md]
    python -m benchmarks.run --suite=gpu

Groups of the CPU suite: sd15 (full size, about 12 GB of memory), flax, kernels (kernels=auto beside kernels=xla),
gradient (full size, 18 GB), training, pairs, reading, compiling, start. Groups of the GPU suite: networks, one-step
images by batch, the guided teacher, and complete training steps by loss, remat and batch; in bfloat16 with cuDNN
attention, against torch.compile. The table goes to stdout and to --out, the seconds of each repeat to stderr.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.sizes import CARD, Size
from benchmarks.table import render
from benchmarks.timing import Row, Side, Spec, compare, step_title

CONFIGS = {name: CARD.configs[name] for name in ("unet", "vae", "text_encoder")}
FLOPS = CARD.flops
FULL = {"configs": CONFIGS, "latent": CARD.latent}
STEPS = 25  # solver steps of the guided teacher
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}  # as launch/env.sh sets it
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "USE_TF": "0",
    "TRANSFORMERS_VERBOSITY": "error",
    "JAX_ENABLE_COMPILATION_CACHE": "false",  # first runs compile; the groups "compiling" and "warm" turn it on
}
SHARED_CARD = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # the peer needs memory too


@dataclasses.dataclass(frozen=True)
class Group:
    """Our side, and the peers it is compared with, by name.

    Attributes:
      only: beginning of the titles that are run; all without it.
    """

    ours: Spec
    peers: dict[str, Spec]
    only: str = ""


def spec(place: str, **options: Any) -> Spec:
    """`spec("sd15.ours", …)` is that function of benchmarks.sd15."""
    module, function = place.split(".")
    return Spec(f"benchmarks.{module}", function, options)


def cpu(compiled: bool) -> dict[str, Group]:
    """The groups for a CPU, float32; `compiled` adds torch.compile."""
    size = FULL | {"batches": [1], "steps": 1, "dtype": "float32"}
    ours, peer = spec("sd15.ours", flops=FLOPS, attention="auto", **size), {"compiled": False, "device": "cpu", **size}
    slope = {"configs": CONFIGS, "latent": 16, "batch": 1, "dtype": "float32"}
    groups = {
        "sd15": Group(ours, {"PyTorch eager": spec("peers.pytorch", **peer)}),
        "flax": Group(ours, {"diffusers' Flax": spec("peers.flax", batches=[1], steps=1, **FULL)}),
        "kernels": Group(
            ours, {"kernels=xla": spec("sd15.ours", flops=FLOPS, attention="auto", kernels="xla", **size)}
        ),
        "gradient": Group(
            spec("training.gradient", attention="auto", remat="none", **slope),
            {"PyTorch": spec("twins.gradient", **slope)},
        ),
        "training": Group(
            spec("training.embedded", batch=32, devices=2), {"PyTorch": spec("twins.embedded", batch=32)}
        ),
        "training1": Group(
            spec("training.embedded", batch=32, devices=1), {"PyTorch": spec("twins.embedded", batch=32)}
        ),
        "pairs": Group(
            spec("training.generation", batch=32, devices=2), {"PyTorch": spec("twins.generation", batch=32)}
        ),
        "reading": Group(
            spec("startup.reading", ours=True, count=4096),
            {"TFDS' data source": spec("startup.reading", ours=False, count=4096)},
        ),
        "compiling": Group(
            spec("startup.compiling", cached=True), {"without cache": spec("startup.compiling", cached=False)}
        ),
        "start": Group(spec("startup.ours", cached=False), {"PyTorch": spec("startup.theirs")}),
        "warm": Group(spec("startup.ours", cached=True), {"PyTorch": spec("startup.theirs")}),
    }
    if compiled:
        groups["sd15"].peers["torch.compile"] = spec("peers.pytorch", **peer | {"compiled": True})
    return groups


def gpu(compiled: bool, size: Size = CARD) -> dict[str, Group]:
    """The groups for one GPU: networks, images by batch, the guided teacher, and training by loss, remat and batch."""
    peer = "torch.compile" if size.compiled else "PyTorch eager"
    how = {"device": size.device, "compiled": size.compiled}
    common = {"latent": size.latent, "dtype": size.dtype}
    inference = {"configs": {name: size.configs[name] for name in size.flops}, "steps": size.steps, **common}

    def drawing(batch: int, only: str) -> Group:
        options = inference | {"batches": [batch]}
        ours = spec("sd15.ours", flops=size.flops, attention="auto", **options)
        return Group(ours, {peer: spec("peers.pytorch", **how, **options)}, only)

    def training(loss: str, remat: str, batch: int) -> Group:
        options = {"configs": size.configs, "loss": loss, "remat": remat, "batch": batch, **common}
        options |= {"crop": size.crop, "margin": size.margin}
        return Group(spec("training.full", attention="auto", **options), {peer: spec("twins.full", **how, **options)})

    groups = {name: drawing(1, name) for name in ("CLIP text", "UNet", "VAE decoder")}
    groups |= {name: drawing(batch, name) for batch in size.batches for name in [f"one-step image, batch {batch}"]}
    groups[f"{size.steps} guided teacher steps"] = drawing(1, f"{size.steps} guided")
    return groups | {
        step_title(loss, remat, batch): training(loss, remat, batch) for loss, remat, batch in size.training
    }


SUITES = {"cpu": cpu, "gpu": gpu}


def measure(name: str, group: Group, repeats: int) -> tuple[list[Row], list[str]]:
    """A group's rows, and a line for each side that did not run. Our side uses huge pages, as the launch scripts do."""
    rows, failed = [], []
    try:
        with Side(dataclasses.replace(group.ours, environment=HUGE_PAGES)) as ours:
            for peer, theirs in group.peers.items():
                found, ended = against(ours, name, peer, theirs, repeats, group.only)
                rows, failed = rows + found, failed + ended
    except EOFError:
        failed.append(f"{name}: our side ended early")
    return rows, failed


def against(ours: Side, name: str, peer: str, theirs: Spec, repeats: int, only: str) -> tuple[list[Row], list[str]]:
    """The rows of one peer, or a line that says that its process ended."""
    try:
        with Side(theirs) as side:
            rows = compare(ours, side, peer, repeats, only)
    except EOFError:
        return [], [f"{name}: {peer} ended early"]
    return [dataclasses.replace(row, title=label(name, row.title)) for row in rows], []


def label(group: str, title: str) -> str:
    """Adds what the names of two groups say and their titles do not."""
    return {"training": f"{title}, 2 devices", "training1": f"{title}, 1 device"}.get(group, title)


def choose(groups: dict[str, Group], only: str) -> dict[str, Group]:
    """The groups listed by name, separated by commas; "" means all.

    Raises:
      ValueError: an unknown name.
    """
    wanted = only.split(",") if only else list(groups)
    if unknown := [name for name in wanted if name not in groups]:
        raise ValueError(f"--only={only}: {', '.join(unknown)} is not one of {', '.join(groups)}")
    return {name: groups[name] for name in wanted}


def teacher_image(rows: Sequence[Row]) -> str:
    """A line that adds up the 25-step guided image from its measured parts; "" if they are missing."""
    parts = {(row.title, row.peer): row for row in rows}
    peer = "PyTorch eager"
    wanted = [("CLIP text", 1), ("1 guided teacher step", STEPS), ("VAE decoder", 1)]
    if any((title, peer) not in parts for title, _ in wanted):
        return ""
    ours, theirs = (
        sum(n * getattr(parts[title, peer], side).median for title, n in wanted) for side in ("ours", "theirs")
    )
    return (
        f"\nA {STEPS}-step guided image, added up from its parts (text + {STEPS} steps + decoder), not run: "
        f"ours {ours:.0f} s, {peer} {theirs:.0f} s, ratio {theirs / ours:.2f}.\n"
    )


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", required=True, choices=list(SUITES))
    parser.add_argument("--only", default="", help="groups, separated by commas; all without it")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="CPU: also torch.compile (minutes of compiling)")
    parser.add_argument("--huge_pages", action="store_true", help="the peers' processes use huge pages too, as ours do")
    parser.add_argument("--out", type=Path, help="file for the table")
    options = parser.parse_args(arguments)
    try:
        groups = choose(SUITES[options.suite](options.compile), options.only)
    except ValueError as error:
        parser.error(str(error))
    os.environ.update(ENVIRONMENT)
    if options.suite == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
    if options.suite == "gpu":
        os.environ.update(SHARED_CARD)
    if options.huge_pages:
        os.environ.update(HUGE_PAGES)
    rows, failed = [], []
    for name, group in groups.items():
        found, ended = measure(name, group, options.repeats)
        rows, failed = rows + found, failed + ended
        text = (
            render(rows, options.suite, options.repeats)
            + teacher_image(rows)
            + "".join(f"\n{line}\n" for line in failed)
        )
        if options.out:
            options.out.write_text(text)  # after each group, because a run takes long and may be stopped
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
