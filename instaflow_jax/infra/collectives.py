"""The collectives of a compiled program, read from its HLO text."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping

OPERATIONS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
GRADIENT_SIZE = 2**14  # elements; smaller sums are of scalars, biases and norms
_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64}
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.-]+ = (.*?) ([a-z][\w-]*)\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{\s*$")
_CALLED = re.compile(r"(?:body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.-]+)")
_CONDITION = re.compile(r"condition=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CHANNEL = re.compile(r"channel_id=\d+")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}")
_LISTED = re.compile(r"replica_groups=\{\{([\d,]*)\}")
# The TPU's compiler writes a reduce-scatter as a fusion of an all-reduce and the slices that the devices keep.
_SCATTER = re.compile(r"calls=%?(all-reduce-scatter[\w.-]*)")
_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One array that one instruction sends.

    Attributes:
      operation: one of OPERATIONS.
      dtype, shape: of the array on a device after the collective.
      group: number of devices that take part.
      times: how often a step runs it (once per micro-batch inside their loop).
    """

    operation: str
    dtype: str
    shape: tuple[int, ...]
    group: int
    times: int

    @property
    def size(self) -> int:
        """Bytes of the array on a device."""
        bits = _BITS.get(self.dtype) or int(re.sub(r"\D", "", self.dtype))
        return math.prod(self.shape) * bits // 8

    @property
    def sent(self) -> float:
        """Bytes that each device sends in one step if the devices of a group form a ring."""
        share = {
            "all-reduce": 2 * (self.group - 1) / self.group,
            "all-gather": (self.group - 1) / self.group,
            "reduce-scatter": self.group - 1,
            "all-to-all": (self.group - 1) / self.group,
            "collective-permute": 1,
        }[self.operation]
        return share * self.size * self.times


def read(text: str) -> list[Collective]:
    """The collectives in a compiled program's `as_text()`, those inside loops included.

    Raises:
      ValueError: one of them is in a loop that does not say how often it runs.
    """
    computations, entry = _split(text)
    found: dict[str, list[Collective]] = {}
    _visit(computations, entry, 1, found)
    return [collective for collectives in found.values() for collective in collectives]


def _split(text: str) -> tuple[dict[str, list[tuple[str, str, str]]], str]:
    """Computation → its instructions (result, operation, rest of the line), and the name of the entry computation."""
    computations, entry, current = {}, "", []
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = computations[head[2]] = []
            entry = head[2] if head[1] else entry
        elif instruction := _INSTRUCTION.match(line):
            current.append(instruction.groups())
    return computations, entry


def _visit(computations: Mapping, name: str, times: int, found: dict[str, list[Collective]]) -> None:
    """Adds the collectives of a computation and of those it calls, each once.

    The TPU's compiler spreads an asynchronous collective over several fusions, which all name its channel.
    """
    for result, operation, rest in computations[name]:
        name = operation.removesuffix("-start")
        if name in OPERATIONS:
            arrays = [Collective(name, *array, _group(rest), times) for array in _sent_arrays(operation, result)]
            found.setdefault(_key(arrays, rest), arrays)
            continue
        if scatter := _SCATTER.search(rest):
            inner = next(rest for _, part, rest in computations[scatter[1]] if part.startswith("all-reduce"))
            arrays = [Collective("reduce-scatter", *array, _group(inner), times) for array in _sent_arrays("", result)]
            found[rest] = arrays
            continue
        called = _CALLED.findall(rest) + [n.strip(" %") for names in _BRANCHES.findall(rest) for n in names.split(",")]
        if operation == "while":
            trips, before = _trips(computations, rest), len(found)
            for inner in called:
                _visit(computations, inner, times * (trips or 1), found)
            if len(found) > before and not trips:
                first = list(found.values())[before][0].operation
                raise ValueError(f"a loop with {first} has an unknown trip count: {rest[:200]}")
            continue
        for inner in called:
            _visit(computations, inner, times, found)


def _trips(computations: Mapping, rest: str) -> int | None:
    """How often a loop runs: as XLA states it, or else, as for TPUs, the constant that its condition counts up to.

    jax's scans count from 0 in steps of 1.
    """
    if stated := _TRIPS.search(rest):
        return int(stated[1])
    condition = computations[_CONDITION.search(rest)[1]]
    limits = [
        int(rest.split(")")[0]) for result, part, rest in condition if (result[:5], part) == ("s32[]", "constant")
    ]
    counts = [rest for _, part, rest in condition if part == "compare" and "direction=LT" in rest]
    return limits[0] if len(limits) == len(counts) == 1 else None


def _key(arrays: list[Collective], rest: str) -> str:
    """The channel and what is sent: channels alone are not unique on TPUs."""
    channel = _CHANNEL.search(rest)
    return f"{channel[0]} {[(c.operation, c.shape) for c in arrays]}" if channel else rest


def _sent_arrays(operation: str, result: str) -> list[tuple[str, tuple[int, ...]]]:
    """Dtypes and shapes in an instruction's result; a "-start" lists operands first, then results."""
    arrays = [(dtype, tuple(int(n) for n in dims.split(",") if n)) for dtype, dims in _ARRAY.findall(result)]
    if operation in ("all-gather-start", "reduce-scatter-start", "collective-permute-start"):
        arrays = [a for a in arrays if a != ("u32", ())]
        return arrays[len(arrays) // 2 :]
    return arrays


def _group(rest: str) -> int:
    """Devices in a group; a permute goes from one device to another."""
    if named := _MESH.search(rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if iota := _IOTA.search(rest):
        return int(iota[2])
    listed = _LISTED.search(rest)
    return len(listed[1].split(",")) if listed else 2


def sent_by_operation(collectives: Iterable[Collective]) -> dict[str, float]:
    """Bytes that a device sends in a step, for each of OPERATIONS."""
    total = dict.fromkeys(OPERATIONS, 0.0)
    for collective in collectives:
        total[collective.operation] += collective.sent
    return total


def unexpected(collectives: Iterable[Collective], sharded: Iterable[tuple[int, ...]], sums: int) -> list[str]:
    """The collectives that neither data parallelism nor FSDP explains, one line each.

    As often as gradients are summed, sharded parameters may be gathered twice (forward and backward), and any array
    reduced once. More than that repeats work in every micro-batch; everything else moves activations or state.

    Args:
      sharded: full shapes of the sharded parameters; empty for data parallelism.
      sums: how often a step sums gradients: once for each update, where the compiler moves that out of loops.
    """
    allowed = Counter()
    for shape in sharded:
        allowed[_bare(shape)] += 2 * sums
    lines = []
    for c in collectives:
        line = f"{c.times} × {c.operation} of {c.dtype}{list(c.shape)} among {c.group}"
        if c.operation == "all-gather":
            allowed[_bare(c.shape)] -= c.times
            if allowed[_bare(c.shape)] < 0:
                lines.append(line)
        elif c.operation in ("all-to-all", "collective-permute") or (
            c.times > sums and math.prod(c.shape) >= GRADIENT_SIZE
        ):
            lines.append(line)
    return lines


def _bare(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape without its order and its axes of size 1."""
    return tuple(sorted(n for n in shape if n != 1))
