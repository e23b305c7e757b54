"""How often a loop of a program runs, where that follows from constants.

XLA notes it (`known_trip_count`) for CPU and GPU. For TPU it is read from the loop itself: a
counter that starts at a constant, grows by a constant, and stops at a constant.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from moejax.planning.hlo import Instruction, Module

Lines = Mapping[str, Instruction]
_SAME = {"copy", "bitcast", "copy-start", "copy-done", "convert", "opt-barrier"}  # of a scalar


def trip_count(loop: Instruction, lines: Lines, module: Module) -> int | None:
    """How often the body of a `while` runs; None where that depends on values.

    Args:
      loop: a `while` of the computation `lines`, {name: line}.
      lines: where its operand is.
      module: where its condition and body are.
    """
    if loop.trip_count is not None:
        return loop.trip_count
    named = re.search(r"\bcondition=%?([\w.\-]+)", loop.attributes)
    if named is None:
        return None
    condition = {line.name: line for line in module.computations[named[1]]}
    test = next(line for line in condition.values() if line.is_root)
    if test.opcode != "compare" or "direction=LT" not in test.attributes:
        return None
    counter, bound = (_source(condition, name) for name in test.operands)
    stop = constant(condition, bound)
    index = _index(counter)
    start = _element(lines, loop.operands[0], index)
    first = constant(lines, start) if start is not None else None
    step = _step(module.computations[loop.called[0]], index)
    if None in (stop, index, first, step):
        return None
    return max(0, -(-(stop - first) // step))


def constant(lines: Lines, line: Instruction | None) -> int | None:
    """The value of a line that is a whole number, behind copies; None where it is not one."""
    line = _source(lines, line.name) if line is not None else None
    return line.number if line is not None and line.opcode == "constant" else None


def _source(lines: Lines, name: str) -> Instruction | None:
    """The line that computes a scalar, behind copies."""
    line = lines.get(name)
    while line is not None and line.opcode in _SAME:
        line = lines.get(line.operands[0])
    return line


def _index(line: Instruction | None) -> int | None:
    """Which element of the loop's tuple a line takes."""
    if line is None or line.opcode != "get-tuple-element":
        return None
    found = re.search(r"\bindex=(\d+)", line.attributes)
    return int(found[1]) if found else None


def _element(lines: Lines, name: str, index: int | None) -> Instruction | None:
    """Element `index` of the tuple that a loop starts with."""
    tuple_ = lines.get(name)
    if index is None or tuple_ is None or tuple_.opcode != "tuple":
        return None
    return lines.get(tuple_.operands[index])


def _step(body: tuple[Instruction, ...], index: int | None) -> int | None:
    """What a body adds to element `index`; None unless it is a positive constant."""
    lines = {line.name: line for line in body}
    root = next(line for line in body if line.is_root)
    after = _element(lines, root.name, index)
    after = _source(lines, after.name) if after is not None else None
    if after is None or after.opcode != "add":
        return None
    terms = [_source(lines, name) for name in after.operands]
    if index not in [_index(term) for term in terms]:
        return None
    steps = [constant(lines, term) for term in terms if _index(term) is None]
    return steps[0] if len(steps) == 1 and steps[0] and steps[0] > 0 else None
