"""What a compiled program reads from and writes to a device's memory, counted array by array in its HLO text.

XLA's own count (`cost_analysis`) agrees for a TPU's program compiled at O0 (48.16 GB for the 48.01 found here, the
one-step image of SD 1.5 at batch 8 for v5e). Above O0 that count includes what stays in on-chip memory; it says nothing
for GPUs, and counts a loop's body once.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache

from instaflow_jax.infra import hlo
from instaflow_jax.infra.hlo import Array, Computations, Instruction

OTHER = "other"  # the part of what the compiler adds without saying for whom
_PACKAGE = "/instaflow_jax/"
_TILE = re.compile(r"T\((\d+(?:,\d+)*)\)")
_SPACE = re.compile(r"S\((\d+)\)")
_FRAME = re.compile(r"stack_frame_id=(\d+)")
_SLICES = ("slice", "dynamic-slice", "gather")
_VIEWS = ("bitcast", "reshape", "copy")
# Instructions that move nothing by themselves: names for what others made, or the ends of what was begun before.
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id")
_FREE += ("opt-barrier",)


def read(text: str, compiled_in: str = "") -> Counter[str]:
    """Bytes that one device moves in a call, by the file of this package that asked for it, or OTHER.

    A file is named like "kernels/attention": the innermost frame of this package in the stack. Loops count
    as often as they run, of a conditional the branch that moves most. Kernels count what they take and return, once.

    Args:
      text: of a compiled program.
      compiled_in: the file that had it compiled; it is in every stack, so as the innermost it counts as OTHER.

    Raises:
      ValueError: a loop does not say how often it runs.
    """
    computations, entry = hlo.split(text)
    return _visit(computations, entry, _file_finder(text, computations, compiled_in))


def _visit(computations: Computations, name: str, file_of: Callable[[Instruction], str]) -> Counter[str]:
    moved, results = Counter(), {}
    for instruction in computations[name]:
        results[instruction.name] = instruction.result
        operation = instruction.operation
        if operation == "while":
            times = hlo.trips(computations, instruction)
            inner = _visit(computations, hlo.body(instruction), file_of)
            if times is None and inner:
                raise ValueError(f"a loop has an unknown trip count: {instruction.rest[:200]}")
            moved.update({part: times * size for part, size in inner.items()})
        elif operation == "conditional":
            branches = [_visit(computations, branch, file_of) for branch in instruction.called]
            moved.update(max(branches, key=Counter.total))
        elif operation == "call":
            for inner in instruction.called:
                moved.update(_visit(computations, inner, file_of))
        elif operation not in _FREE and not operation.endswith("-done"):
            moved[file_of(instruction)] += _moved(computations, instruction, results)
    return +moved  # without zeros


def _moved(computations: Computations, instruction: Instruction, results: Mapping[str, str]) -> int:
    """Bytes that one instruction reads and writes."""
    operation, written = instruction.operation, hlo.arrays(instruction.result)
    operands = [hlo.arrays(results.get(name, "")) for name in instruction.operands]
    if operation == "slice-start":  # of a TPU: to or from on-chip memory; the result also names the complete array
        return min(_size(array) for array in written if array.shape)
    if operation.endswith("-start") and instruction.result.startswith("("):  # the result names the operands too
        return sum(map(_in_memory, written))
    if operation in _SLICES:
        return _in_memory(written[0]) + min(_in_memory(operands[0][0]), _size(written[0]))
    if operation == "dynamic-update-slice":
        return 2 * min(_in_memory(operands[0][0]), _size(operands[1][0]))
    if operation == "fusion":
        return _moved_by_fusion(computations[instruction.called[0]], written, operands)
    if operation == "custom-call":  # of a GPU's library, whose bytes are a workspace
        written = [array for array in written if array.dtype not in ("s8", "u8")]
    return sum(map(_in_memory, written)) + sum(_in_memory(array) for arrays in operands for array in arrays)


def _moved_by_fusion(inner: Sequence[Instruction], written: list[Array], operands: list[list[Array]]) -> int:
    """Of operands that are only sliced, the slices; of results that are updated in place, the updates."""
    users: dict[str, list[Instruction]] = {}
    for instruction in inner:
        for name in instruction.operands:
            users.setdefault(name, []).append(instruction)
    named = {instruction.name: instruction for instruction in inner}
    total = 0
    for parameter in (i for i in inner if i.operation == "parameter"):
        whole = sum(map(_in_memory, operands[int(parameter.rest.split(")")[0])]))
        taken = [_taken(parameter.name, user) for user in users.get(parameter.name, [])]
        total += whole if None in taken else min(whole, sum(taken))
    root = next(i for i in inner if i.root)
    outputs = [named[name] for name in root.operands] if root.operation == "tuple" else [root] * len(written)
    for output, array in zip(outputs, written, strict=True):
        while output.operation in _VIEWS and output.operands[0] in named:
            output = named[output.operands[0]]
        size = _in_memory(array)
        if output.operation == "dynamic-update-slice":
            size = min(size, _size(hlo.arrays(named[output.operands[1]].result)[0]))
        total += size
    return total


def _taken(name: str, user: Instruction) -> int | None:
    """Bytes of the array `name` that an instruction of a fusion reads; None for all of it."""
    if user.operands[0] != name or name in user.operands[1:]:
        return None
    if user.operation in _SLICES:
        return _size(hlo.arrays(user.result)[0])
    return 0 if user.operation == "dynamic-update-slice" else None  # updated in place, so only written


def _in_memory(array: Array) -> int:
    """Bytes of an array that is in the device's memory; 0 for one that is on the chip."""
    space = _SPACE.search(array.layout)
    return 0 if space and space[1] != "0" else _size(array)


def _size(array: Array) -> int:
    """Bytes of an array as it lies there: a TPU's tiles fill up its two fastest axes."""
    shape, tile = list(array.shape), _TILE.search(array.layout)
    if tile:
        fastest = [int(axis) for axis in array.layout.split(":")[0].split(",") if axis]
        for axis, length in zip(fastest, reversed(tile[1].split(",")), strict=False):
            shape[axis] = math.ceil(shape[axis] / int(length)) * int(length)
    return math.prod(shape) * hlo.bits(array.dtype) // 8


# ---------------------------------------------------------------- where an instruction comes from


def _file_finder(text: str, computations: Computations, compiled_in: str) -> Callable[[Instruction], str]:
    """A function that names the file of an instruction; of a fusion that says nothing, the file of what is inside."""
    names = {number: name.strip('"') for number, name in _table(text, "FileNames").items()}
    files = {number: names[_field(line, "file_name_id")] for number, line in _table(text, "FileLocations").items()}
    frames = _table(text, "StackFrames")

    @cache
    def file_of_frame(number: int) -> str:
        while number in frames:
            name, line = files[_field(frames[number], "file_location_id")], frames[number]
            if _PACKAGE in name:
                file = name.rpartition(_PACKAGE)[2].removesuffix(".py")
                return OTHER if file == compiled_in else file
            parent = _field(line, "parent_frame_id")
            number = 0 if parent == number else parent
        return OTHER

    def file_of(instruction: Instruction) -> str:
        inside = computations[instruction.called[0]] if instruction.operation == "fusion" else ()
        frames = (_FRAME.search(each.rest) for each in (instruction, *reversed(inside)))
        files = (file_of_frame(int(frame[1])) for frame in frames if frame)
        return next((file for file in files if file != OTHER), OTHER)

    return file_of


def _table(text: str, title: str) -> dict[int, str]:
    """Lines "NUMBER VALUE" below a title in the text's head; empty where jax writes none."""
    found = re.search(rf"^{title}\n((?:\d+ .*\n)+)", text, re.MULTILINE)
    lines = found[1].splitlines() if found else []
    return {int(number): value for number, value in (line.split(" ", 1) for line in lines)}


def _field(line: str, name: str) -> int:
    found = re.search(rf"\b{name}=(\d+)", line)
    return int(found[1]) if found else 0
