"""Reads the text of XLA's optimised HLO: computations, instructions, shapes, loops, branches."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping

_BITS = {"pred": 8, "token": 0, "opaque": 0, "u4": 4, "s4": 4, "f4e2m1fn": 4, "bf16": 16, "c64": 64}
_BITS |= {"c128": 128}
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_CALLS = ("to_apply", "calls", "body", "true_computation", "false_computation")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")
_LINE = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)$")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a shape; `memory` is the space that a layout names (0 is the main memory)."""

    dtype: str
    dims: tuple[int, ...]
    memory: int

    @property
    def num_bytes(self) -> int:
        """Without the padding of tiled layouts."""
        return -(-math.prod(self.dims) * _bits(self.dtype) // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation; `operands` are names of other lines.

    `number` is that of a parameter, or the value of a constant that is a whole number, None of all
    else; `is_root` marks what the computation returns.
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    number: int | None = None
    is_root: bool = False

    @property
    def arrays(self) -> tuple[Array, ...]:
        """Of its result: several of a tuple."""
        return arrays(self.shape)

    @property
    def called(self) -> tuple[str, ...]:
        """The computations that it runs: of a loop the body, of a conditional every branch."""
        if (listed := re.search(r"branch_computations=\{([^}]*)\}", self.attributes)) is not None:
            return tuple(name.strip().lstrip("%") for name in listed[1].split(","))
        found = [re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes) for key in _CALLS]
        return tuple(match[1] for match in found if match)

    @property
    def trip_count(self) -> int | None:
        """How often a loop runs, where XLA knows; None elsewhere."""
        found = _TRIPS.search(self.attributes)
        return int(found[1]) if found else None


@dataclasses.dataclass(frozen=True)
class Module:
    """The computations of a program by name, and which one is the whole."""

    computations: Mapping[str, tuple[Instruction, ...]]
    entry: str


def read(text: str) -> Module:
    """Raises ValueError where the text is no HLO module."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", []
    for line in text.splitlines():
        if found := _LINE.match(line):
            current.append(_instruction(found[2], found[3], is_root=found[1] is not None))
        elif head := _HEAD.match(line):
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
    if not entry:
        raise ValueError("this is not the text of an HLO module: it has no ENTRY")
    return Module({name: tuple(lines) for name, lines in computations.items()}, entry)


def arrays(shape: str) -> tuple[Array, ...]:
    """The arrays of a shape, which may be a tuple of tuples."""
    return tuple(
        Array(dtype, tuple(int(n) for n in dims.split(",") if n), _memory(layout))
        for dtype, dims, layout in _ARRAY.findall(shape)
        if dtype not in ("token", "opaque")
    )


def _memory(layout: str) -> int:
    found = re.search(r"S\((\d+)\)", layout)
    return int(found[1]) if found else 0


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    found = re.match(r"[a-z]+?(\d+)", dtype)
    if found is None:
        raise ValueError(f"the dtype {dtype!r} of an HLO array is not known")
    return int(found[1])


def _instruction(name: str, rest: str, *, is_root: bool) -> Instruction:
    shape, rest = _closed(rest) if rest.startswith("(") else rest.split(" ", 1)
    found = re.match(r"\s*([\w\-]+)(.*)$", rest)
    if found is None:
        raise ValueError(f"no opcode in {rest[:80]}")
    inside, attributes = _closed(found[2]) if found[2].startswith("(") else ("", found[2])
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    whole = re.fullmatch(r"\((-?\d+)\)", inside) if found[1] in ("parameter", "constant") else None
    number = int(whole[1]) if whole else None
    return Instruction(name, shape, found[1], operands, attributes, number, is_root)


def _closed(text: str) -> tuple[str, str]:
    """(the parenthesis that `text` begins with, the rest)."""
    depth = 0
    for found in re.finditer(r"[()]", text):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return text[: found.end()], text[found.end() :]
    raise ValueError(f"a parenthesis stays open in {text[:80]}")
