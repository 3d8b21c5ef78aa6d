"""The collectives of a compiled program, read from its HLO text."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable

from instaflow_jax.infra import hlo
from instaflow_jax.infra.hlo import Instruction

OPERATIONS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
GRADIENT_SIZE = 2**14  # elements; smaller sums are of scalars, biases and norms
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
        return math.prod(self.shape) * hlo.bits(self.dtype) // 8

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
    computations, entry = hlo.split(text)
    found: dict[str, list[Collective]] = {}
    _visit(computations, entry, 1, found)
    return [collective for collectives in found.values() for collective in collectives]


def _visit(computations: hlo.Computations, name: str, times: int, found: dict[str, list[Collective]]) -> None:
    """Adds the collectives of a computation and of those it calls, each once.

    The TPU's compiler spreads an asynchronous collective over several fusions, which all name its channel.
    """
    for instruction in computations[name]:
        rest, operation = instruction.rest, instruction.operation.removesuffix("-start")
        if operation in OPERATIONS:
            arrays = [Collective(operation, *array, _group(rest), times) for array in _sent_arrays(instruction)]
            found.setdefault(_key(arrays, rest), arrays)
            continue
        if scatter := _SCATTER.search(rest):
            inner = next(i.rest for i in computations[scatter[1]] if i.operation.startswith("all-reduce"))
            arrays = [Collective("reduce-scatter", *array, _group(inner), times) for array in _sent_arrays(instruction)]
            found[rest] = arrays
            continue
        if operation == "while":
            trips, before = hlo.trips(computations, instruction), len(found)
            for inner in instruction.called:
                _visit(computations, inner, times * (trips or 1), found)
            if len(found) > before and not trips:
                first = list(found.values())[before][0].operation
                raise ValueError(f"a loop with {first} has an unknown trip count: {rest[:200]}")
            continue
        for inner in instruction.called:
            _visit(computations, inner, times, found)


def _key(arrays: list[Collective], rest: str) -> str:
    """The channel and what is sent: channels alone are not unique on TPUs."""
    channel = _CHANNEL.search(rest)
    return f"{channel[0]} {[(c.operation, c.shape) for c in arrays]}" if channel else rest


def _sent_arrays(instruction: Instruction) -> list[tuple[str, tuple[int, ...]]]:
    """Dtypes and shapes in an instruction's result; a "-start" lists operands first, then results."""
    arrays = [(array.dtype, array.shape) for array in hlo.arrays(instruction.result)]
    if instruction.operation in ("all-gather-start", "reduce-scatter-start", "collective-permute-start"):
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
