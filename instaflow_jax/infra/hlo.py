"""Reads the text of a compiled program (`jax.stages.Compiled.as_text`): its computations, arrays and loops."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\](?:\{([^}]*)\})?")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{\s*$")
_CALLED = re.compile(r"(?:body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.-]+)")
_BODY = re.compile(r"body=%?([\w.-]+)")
_CONDITION = re.compile(r"condition=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64}


class Array(NamedTuple):
    """One array of an instruction's result.

    Attributes:
      layout: what the text says between braces, such as "1,0:T(8,128)S(1)": axes from the fastest to the slowest,
        tiles, memory space.
    """

    dtype: str
    shape: tuple[int, ...]
    layout: str


class Instruction(NamedTuple):
    """One line of a computation: `name = result operation(rest`, where rest begins with the operands."""

    root: bool
    name: str
    result: str
    operation: str
    rest: str

    @property
    def operands(self) -> list[str]:
        """Names of the instructions that it reads."""
        names = re.split(r"\)(?:,|$)", self.rest, maxsplit=1)[0].rstrip(")")
        return re.findall(r"%?([\w.-]+)(?:,|$)", re.sub(r"/\*.*?\*/", "", names)) if names else []

    @property
    def called(self) -> list[str]:
        """Names of the computations that it calls."""
        listed = [name.strip(" %") for names in _BRANCHES.findall(self.rest) for name in names.split(",")]
        return _CALLED.findall(self.rest) + listed


Computations = Mapping[str, Sequence[Instruction]]


def split(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The instructions of each computation, and the name of the entry computation."""
    computations, entry, current = {}, "", []
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = computations[head[2]] = []
            entry = head[2] if head[1] else entry
        elif found := _INSTRUCTION.match(line):
            current.append(Instruction(bool(found[1]), *found.groups()[1:]))
    return computations, entry


def arrays(result: str) -> list[Array]:
    """The arrays of an instruction's result: one, or those of a tuple."""
    return [
        Array(dtype, tuple(int(n) for n in dims.split(",") if n), layout)
        for dtype, dims, layout in _ARRAY.findall(result)
    ]


def bits(dtype: str) -> int:
    """Of one element of an array."""
    return _BITS.get(dtype) or int(re.sub(r"\D", "", dtype) or 0)


def body(loop: Instruction) -> str:
    """The name of a while loop's body."""
    return _BODY.search(loop.rest)[1]


def trips(computations: Computations, loop: Instruction) -> int | None:
    """How often a loop runs: as XLA states it, or else, as for TPUs, the constant that its condition counts up to.

    jax's scans count from 0 in steps of 1.
    """
    if stated := _TRIPS.search(loop.rest):
        return int(stated[1])
    condition = computations[_CONDITION.search(loop.rest)[1]]
    limits = [int(i.rest.split(")")[0]) for i in condition if (i.result[:5], i.operation) == ("s32[]", "constant")]
    counts = [i for i in condition if i.operation == "compare" and "direction=LT" in i.rest]
    return limits[0] if len(limits) == len(counts) == 1 else None
