"""Stage `plan`: compiles a stage's program for a TPU or GPU that is not there, and says what it would take."""

import contextlib
import dataclasses
import itertools
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from ml_collections import ConfigDict

from instaflow_jax.data.pairs import manifest as pairs_manifest
from instaflow_jax.data.pairs import store as pairs_store
from instaflow_jax.infra import collectives, cost, files, traffic
from instaflow_jax.infra.messages import first_ten, markdown_table
from instaflow_jax.stages.common.ranges import check_ranges
from instaflow_jax.stages.plan import programs, targets
from instaflow_jax.stages.plan.programs import Program
from instaflow_jax.stages.plan.targets import Target

Counted = TypeVar("Counted")
DIRECTORY = "plan"
THIS_FILE = "stages/plan/stage"
OPTIMIZATION_LEVELS = ("UNKNOWN", "O0", "O1", "O2", "O3")
_RECORD_OVERHEAD = 66  # bytes that ArrayRecord adds to a record
_BLOCK = 2**16  # ArrayRecord files consist of blocks of this size; the last one holds the index


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one program takes. Bytes are those of one device; seconds are those at the peaks, not measurements.

    Attributes:
      fields: the fields of the config that decide it.
      fits: whether it compiled and `memory.total` is below `available`.
      memory: None if the compiler refused the program for lack of memory.
      needed: bytes, by the compiler's refusal or `memory.total`.
      flops: of one call on all devices together, without recomputation.
      accessed: bytes that a call reads and writes, by file, see `traffic.read`; empty if they are not counted.
      sent: bytes that a device sends in a call, by collective operation; empty if they are not counted.
      seconds: of one call: "model" for `flops` at the peak FLOP/s, "compute" with what is recomputed, "memory" at the
        peak bandwidth, and "bound", which no run is faster than.
    """

    program: str
    target: str
    devices: int
    fields: dict[str, Any]
    fits: bool
    memory: cost.Memory | None
    needed: int
    available: int
    flops: float
    accessed: dict[str, float]
    sent: dict[str, float]
    unexpected: list[str]
    seconds: dict[str, float]
    rows: int
    unit: str
    calls: int
    compile_seconds: float

    @property
    def moved(self) -> float:
        """All bytes of `accessed`."""
        return sum(self.accessed.values())

    @property
    def hours(self) -> float:
        """Of all calls, at least."""
        return self.calls * self.seconds["bound"] / 3600

    @property
    def device_days(self) -> float:
        """Of all calls on all devices, at least."""
        return self.hours * self.devices / 24

    @property
    def mfu(self) -> float:
        """The largest possible share of the peak FLOP/s."""
        return self.seconds["model"] / self.seconds["bound"]


def run(config: ConfigDict, workdir: str) -> None:
    """Compiles, prints the plan, and writes `workdir`/plan/PROGRAM_TARGET.json and .md.

    Raises:
      ValueError, FileNotFoundError: a field of the config is wrong, or the compiler is not installed.
    """
    check(config, workdir)
    jax.config.update("jax_platforms", "cpu")  # where constants are made; libtpu would look for a TPU
    target = targets.find(config.target)
    variants = list(search_space(config.program, len(target.devices))) if config.search else [{}]
    plans = []
    for number, fields in enumerate(variants, 1):
        program = config.program.copy_and_resolve_references().unlock()
        program.update_from_flattened_dict(fields)
        print(f"[{number}/{len(variants)}] compiling {programs.describe(program)} for {target.name}", flush=True)
        plans.append(measure(program, config.shapes, target, config.optimization_level))
        print(summary(plans[-1]), flush=True)
    best = fastest(plans)
    if config.search:
        print(f"\nfastest plan that fits: {best.fields if best else 'none'}", flush=True)
    price, size = config.dollars_per_device_hour, pair_bytes(config.program, config.shapes)
    if best and best.calls > 1:
        print(amount(best, price, size), flush=True)
    write(Path(workdir) / DIRECTORY, plans, price, size)


def check(config: ConfigDict, workdir: str) -> None:
    """Every check before the first program is compiled. Raises as `run` does."""
    check_ranges(config)
    targets.check(config.target)
    if config.optimization_level not in OPTIMIZATION_LEVELS:
        raise ValueError(
            f"config.optimization_level={config.optimization_level!r} is not one of {', '.join(OPTIMIZATION_LEVELS)}"
        )
    programs.check(config.program, config.shapes)


# ---------------------------------------------------------------- one program


def measure(config: ConfigDict, model: str, target: Target, optimization_level: str) -> Plan:
    """Traces, lowers and compiles the program of the stage that `config` configures."""
    program = programs.trace(config, model, target.devices)
    start, memory, accessed, sends = time.monotonic(), None, {}, None
    try:
        with optimizing(optimization_level):
            compiled = program.traced.lower().compile(compiler_options=target.options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        seconds, needed = time.monotonic() - start, refused_bytes(str(error))
    else:
        seconds, memory = time.monotonic() - start, cost.memory(compiled)
        needed, text = memory.total if memory else 0, compiled.as_text()
        sends = count("what it sends", collectives.read, text)
        accessed = dict((count("its memory traffic", traffic.read, text, THIS_FILE) or Counter()).most_common())
    return Plan(
        program=config.stage,
        target=target.name,
        devices=len(target.devices),
        fields=programs.fields(config),
        fits=memory is not None and memory.total <= target.peak.memory,
        memory=memory,
        needed=needed,
        available=int(target.peak.memory),
        flops=program.flops,
        accessed=accessed,
        sent={} if sends is None else collectives.sent_by_operation(sends),
        unexpected=collectives.unexpected(sends or [], program.sharded, sums(program, target, optimization_level)),
        seconds=roofline(program, target, sum(accessed.values())),
        rows=program.rows,
        unit=program.unit,
        calls=program.calls,
        compile_seconds=seconds,
    )


def count(what: str, read: Callable[..., Counted], *inputs: str) -> Counted | None:
    """read(*inputs); None, with a line, where it raises ValueError, so that the rest of the plan is kept."""
    try:
        return read(*inputs)
    except ValueError as error:
        print(f"  {what} is not counted: {error}", flush=True)
        return None


def sums(program: Program, target: Target, optimization_level: str) -> int:
    """How often a call sums gradients: a TPU's compiler moves sums out of the loop over micro-batches only above O1."""
    inside = target.devices[0].platform == "tpu" and optimization_level in ("O0", "O1")
    return program.rounds if inside else program.sums


@contextlib.contextmanager
def optimizing(level: str) -> Iterator[None]:
    """Programs that are compiled inside get this optimization level, and stay out of the persistent cache.

    jax cannot read programs of absent devices back from there, and would warn at every later plan.
    """
    fields = {"jax_optimization_level": level, "jax_persistent_cache_min_compile_time_secs": float("inf")}
    before = {name: getattr(jax.config, name) for name in fields}
    try:
        for name, value in fields.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def roofline(program: Program, target: Target, accessed: float) -> dict[str, float]:
    """Seconds of a call at the peaks.

    The bound of a GPU is that of arithmetic: its cache holds some of what one kernel writes until the next reads it.
    """
    peak = target.peak.flops * len(target.devices)
    model, compute = program.flops / peak, cost.count_flops(program.traced.jaxpr) / peak
    memory = accessed / target.peak.bandwidth
    bound = compute if target.devices[0].platform == "gpu" else max(compute, memory)
    return {"model": model, "compute": compute, "memory": memory, "bound": bound}


def refused_bytes(message: str) -> int:
    """The memory that a compiler's refusal says the program needs; 0 if it does not say."""
    found = re.search(r"Used ([\d.]+)([KMGT]?) of", message)
    return int(float(found[1]) * 1024 ** " KMGT".index(found[2] or " ")) if found else 0


# ---------------------------------------------------------------- the search


def search_space(config: ConfigDict, devices: int) -> Iterator[dict[str, Any]]:
    """Fields to try: for training remat, FSDP and micro-batches of 1 to 16 samples a device, for inference batches."""
    if config.stage in ("sample", "generate"):
        yield from ({"batch": batch} for batch in (1, 4, 16))
        return
    rounds = [
        config.batch_size // (devices * size) for size in (16, 8, 4, 1) if not config.batch_size % (devices * size)
    ]
    for remat, fsdp, accumulate in itertools.product(("none", "attention", "blocks"), {1, devices}, rounds):
        yield {f"remat.{name}": remat for name in config.remat} | {"fsdp": fsdp, "accumulate": accumulate}


def fastest(plans: list[Plan]) -> Plan | None:
    """The plan that fits with the lowest bound a row; of equals, the one with most free memory."""
    fitting = [plan for plan in plans if plan.fits]
    return min(fitting, key=lambda p: (p.seconds["bound"] / p.rows, p.needed), default=None)


# ---------------------------------------------------------------- what is printed and written


def summary(plan: Plan) -> str:
    """A few lines for people."""
    gib = 1 / 2**30
    if plan.memory is None:
        needed = f"{plan.needed * gib:.2f} GiB" if plan.needed else "more memory than there is"
        return f"  does not fit: it needs {needed} of {plan.available * gib:.0f} GiB a device"
    parts = ", ".join(f"{name} {size * gib:.2f}" for name, size in dataclasses.asdict(plan.memory).items())
    largest = ", ".join(f"{name} {100 * size / plan.moved:.0f} %" for name, size in list(plan.accessed.items())[:4])
    moved = f"{plan.moved / 1e9:.1f} GB a device ({largest})" if plan.accessed else "not counted"
    sends = ", ".join(f"{name} {size / 2**20:,.0f} MiB" for name, size in plan.sent.items() if size) or "nothing"
    sent = sends if plan.sent else "not counted"
    fits, ms = "fits" if plan.fits else "does not fit", {name: 1000 * s for name, s in plan.seconds.items()}
    return (
        f"  {fits}: {plan.memory.total * gib:.2f} of {plan.available * gib:.0f} GiB a device ({parts}); compiled in "
        f"{plan.compile_seconds:.0f} s\n"
        f"  a call of {plan.rows} {plan.unit}s: {plan.flops / 1e12:.4g} TFLOP, reads and writes {moved}, sends {sent}\n"
        f"  {ms['bound']:.3g} ms at the peaks (not a measurement: arithmetic {ms['compute']:.3g}, without "
        f"recomputation {ms['model']:.3g}; memory {ms['memory']:.3g}), so MFU at most {100 * plan.mfu:.0f} %"
    ) + (f"\n  unexpected: {first_ten(plan.unexpected, '; ')}" if plan.unexpected else "")


def amount(plan: Plan, price: float, pair_size: int) -> str:
    """Hours, device-days, gigabytes and dollars of the configured number of pairs or steps, at least."""
    parts = [f"{plan.calls:,} calls on {plan.target}: {plan.hours:.4g} hours, {plan.device_days:.4g} device-days"]
    if price:
        parts.append(f"{plan.device_days * 24 * price:,.0f} dollars")
    if pair_size:
        parts.append(f"{pair_size / 1e9:.4g} GB of pairs")
    return ", ".join(parts) + " at the bound; a real run takes longer"


def write(directory: Path, plans: list[Plan], price: float, pair_size: int) -> None:
    """The plans as JSON and as a Markdown table."""
    directory.mkdir(parents=True, exist_ok=True)
    name = f"{plans[0].program}_{plans[0].target}"
    rows = [
        dataclasses.asdict(plan)
        | {"hours": plan.hours, "device_days": plan.device_days, "mfu_bound": plan.mfu}
        | {"dollars": plan.device_days * 24 * price, "pair_bytes": pair_size}
        for plan in plans
    ]
    about = {"jax": jax.__version__, "date": time.strftime("%Y-%m-%d")}
    files.write_json(directory / f"{name}.json", about | {"plans": rows})
    files.write_text(directory / f"{name}.md", table(plans))
    print(f"wrote {directory / name}.json and .md", flush=True)


def table(plans: list[Plan]) -> str:
    """A Markdown table, one row a plan."""
    columns = ("target", "fields", "fits", "arguments GiB", "temporaries GiB", "total GiB", "TFLOP a call")
    columns += ("GB accessed", "bound ms", "MFU at most", "sent MiB", "compiled in s")
    return markdown_table(columns, map(cells, plans))


def cells(plan: Plan) -> list[str]:
    """A row of the table."""
    memory = plan.memory or cost.Memory(0, 0, 0)
    gib = [f"{size / 2**30:.2f}" if plan.memory else "–" for size in (memory.arguments, memory.temporaries)]
    return [
        plan.target,
        ", ".join(f"{name} {value}" for name, value in plan.fields.items()),
        "yes" if plan.fits else "no",
        *gib,
        f"{plan.needed / 2**30:.2f}",
        f"{plan.flops / 1e12:.4g}",
        f"{plan.moved / 1e9:.1f}" if plan.accessed else "–",
        f"{1000 * plan.seconds['bound']:.3g}",
        f"{100 * plan.mfu:.0f} %",
        f"{sum(plan.sent.values()) / 2**20:,.0f}" if plan.sent else "–",
        f"{plan.compile_seconds:.0f}",
    ]


def pair_bytes(config: ConfigDict, model: str) -> int:
    """Bytes on disk of all pairs that the stage makes; 0 for a stage that makes none."""
    if config.stage != "generate":
        return 0
    latent, tokens = programs.pair_shapes(config, model)
    recipe = {"latent_shape": latent, "tokens": tokens, "store_noise": config.store_noise}
    recipe |= {"count": config.count, "shard_size": config.shard_size}
    X0 = np.zeros(latent, np.float16)
    row = {"prompt": "x" * 60, "ids": np.full(tokens, 49407, np.int32), "seed": config.count, "X0": X0, "X1": X0}
    size = len(pairs_store.serialize(pairs_store.make_features(recipe), recipe, **row)) + _RECORD_OVERHEAD
    shards = (pairs_manifest.shard_range(recipe, shard) for shard in range(pairs_manifest.shard_count(recipe)))
    return sum((-(-len(shard) * size // _BLOCK) + 1) * _BLOCK for shard in shards)
