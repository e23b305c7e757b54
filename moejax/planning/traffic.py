"""Bytes that an instruction moves through main memory: what it reads and what it writes, once.

Like XLA's own cost analysis, a slice costs its own bytes and not those of the array that it is cut
from, also inside a fusion, and an update in place costs the update. What a layout keeps on the chip
(another memory space) costs nothing. Tiled layouts pad, which is not counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moejax.planning.hlo import Array, Instruction, Module

_FREE = {
    "after-all",
    "async-start",
    "bitcast",
    "call",
    "conditional",
    "constant",
    "get-tuple-element",
    "opt-barrier",
    "parameter",
    "partition-id",
    "recv",
    "replica-id",
    "send",
    "tuple",
    "while",
}
_CUTS = {"dynamic-slice", "slice", "gather"}  # of their first operand they read what they return


def bytes_moved(
    instruction: Instruction, lines: Mapping[str, Instruction], module: Module
) -> float:
    """For an instruction outside of fusions.

    Args:
      instruction: of the computation `lines`, {name: line}.
      lines: where its operands are.
      module: where a fusion's inside is.
    """
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith(("-done", "-update")):
        return 0
    given = [lines[name].arrays if name in lines else () for name in instruction.operands]
    if opcode == "fusion":
        return _of_fusion(instruction, given, module)
    if opcode in _CUTS:
        return 2 * main_bytes(instruction.arrays) + sum(map(main_bytes, given[1:]))
    if opcode in ("dynamic-update-slice", "scatter"):
        return 2 * main_bytes(given[2 if opcode == "scatter" else 1])
    if opcode.endswith("-start"):  # an asynchronous copy: its result names both ends, and marks
        return main_bytes(given[0]) + main_bytes(instruction.arrays[:1]) if given else 0
    return main_bytes(instruction.arrays) + sum(map(main_bytes, given))


def bytes_of_collective(instruction: Instruction, lines: Mapping[str, Instruction]) -> float:
    """What a collective reads here and writes here, once; an asynchronous one where it starts."""
    names = instruction.operands
    if instruction.opcode.startswith("ragged-all-to-all"):
        names = names[:1]  # the second is where it writes, the others are sizes
    given = [a for name in instruction.operands if name in lines for a in lines[name].arrays]
    read = sum(main_bytes(lines[name].arrays) for name in names if name in lines)
    return read + main_bytes(_collective_results(instruction, given))


def _collective_results(instruction: Instruction, given: Sequence[Array]) -> Sequence[Array]:
    """What comes out of it; most `-start`s return what is `given` before that, and marks behind."""
    found = instruction.arrays
    if not instruction.opcode.endswith("-start"):
        return found
    unmarked = [a for a in found if a.dtype != "u32" or a.dims]
    return unmarked[len(given) :] or unmarked  # all-reduce-start has two spellings


def _of_fusion(
    instruction: Instruction, given: Sequence[tuple[Array, ...]], module: Module
) -> float:
    if len(instruction.called) != 1:
        return main_bytes(instruction.arrays) + sum(map(main_bytes, given))
    inside = module.computations[instruction.called[0]]
    lines = {line.name: line for line in inside}
    read = sum(
        _read(line, inside, arrays)
        for line, arrays in zip(_parameters(inside), given, strict=False)
    )
    results = _results(inside, lines)
    if len(results) != len(instruction.arrays):
        return read + main_bytes(instruction.arrays)
    written = 0
    for line, array in zip(results, instruction.arrays, strict=True):
        updates = line is not None and line.opcode == "dynamic-update-slice"
        update = lines.get(line.operands[1]) if updates else None
        written += main_bytes((array,)) and (_size(update.arrays) if update else array.num_bytes)
    return read + written


def _read(
    parameter: Instruction, inside: Sequence[Instruction], arrays: tuple[Array, ...]
) -> float:
    """Of an operand of a fusion: slices of it where only slices are used."""
    whole = main_bytes(arrays)
    if not whole:
        return 0
    cut = 0
    for line in inside:
        if parameter.name not in line.operands:
            continue
        first_alone = line.operands.index(parameter.name) == 0
        first_alone &= parameter.name not in line.operands[1:]
        if line.opcode in _CUTS and first_alone:
            cut += _size(line.arrays)
        elif not (line.opcode == "dynamic-update-slice" and first_alone):
            return whole
    return min(cut, whole)


def _parameters(inside: Sequence[Instruction]) -> list[Instruction]:
    """In the order of the fusion's operands."""
    found = [line for line in inside if line.opcode == "parameter"]
    return sorted(found, key=lambda line: line.number or 0)


def _results(
    inside: Sequence[Instruction], lines: Mapping[str, Instruction]
) -> list[Instruction | None]:
    """The lines whose values a fusion returns, behind what changes no value."""
    root = next(line for line in inside if line.is_root)
    names = root.operands if root.opcode == "tuple" else (root.name,)
    found = []
    for name in names:
        line = lines.get(name)
        while line is not None and line.opcode == "bitcast":
            line = lines.get(line.operands[0])
        found.append(line)
    return found


def main_bytes(arrays: Sequence[Array]) -> int:
    """Bytes in main memory."""
    return sum(a.num_bytes for a in arrays if a.memory == 0)


def _size(arrays: Sequence[Array]) -> int:
    return sum(a.num_bytes for a in arrays)
