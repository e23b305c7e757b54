"""What a compiled program does on one path through its conditionals: collectives, products, loops.

Reads the text of XLA's optimised HLO. A collective counts once whether it is one instruction or a
pair of `-start` and `-done`. Nothing is known of how often a loop runs, so what is in a loop counts
once, as in XLA's own cost analysis.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
_BYTES |= {"f64": 8, "s64": 8, "u64": 8}
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_CALLS = ("to_apply", "calls", "body", "condition", "true_computation", "false_computation")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str


@dataclasses.dataclass(frozen=True)
class Work:
    """What one path executes.

    Attributes:
      collectives: how many of each kind.
      num_bytes: the results of those of each kind, in bytes on one device.
      flops: of all `dot` instructions.
    """

    collectives: collections.Counter[str]
    num_bytes: collections.Counter[str]
    flops: int


class Program:
    """The computations of one module."""

    def __init__(self, text: str):
        self._computations: dict[str, list[Instruction]] = {}
        self._known: dict[str, Work] = {}
        self._entry = ""
        current: list[Instruction] = []
        for line in text.splitlines():
            if head := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
                current = self._computations.setdefault(head[2], [])
                self._entry = head[2] if head[1] else self._entry
            elif found := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)$", line):
                current.append(_instruction(*found.groups()))
        if not self._entry:
            raise ValueError("this is not the text of an HLO module: it has no ENTRY")

    @functools.cached_property
    def balanced(self) -> Work:
        """The path of a balanced routing.

        Of each conditional the branch without collectives in loops, and of such the one with the
        fewest collectives: neither several rounds nor foreign experts.
        """
        return self._work(self._entry)

    def _work(self, computation: str) -> Work:
        if computation not in self._known:
            self._known[computation] = self._sum(computation)
        return self._known[computation]

    def _sum(self, computation: str) -> Work:
        total = Work(collections.Counter(), collections.Counter(), 0)
        shapes = {i.name: i.shape for i in self._computations[computation]}
        for instruction in self._computations[computation]:
            parts = [self._work(name) for name in self._called(instruction)]
            if (kind := collective(instruction.opcode)) is not None:
                size = _result_bytes(instruction)
                parts.append(
                    Work(collections.Counter([kind]), collections.Counter({kind: size}), 0)
                )
            elif instruction.opcode == "dot":
                flops = _dot_flops(instruction, shapes)
                parts.append(Work(collections.Counter(), collections.Counter(), flops))
            for part in parts:
                total = Work(
                    total.collectives + part.collectives,
                    total.num_bytes + part.num_bytes,
                    total.flops + part.flops,
                )
        return total

    def _called(self, instruction: Instruction) -> list[str]:
        names = branches(instruction)
        if names:
            return [min(names, key=self._distance_from_balanced)]
        if collective(instruction.opcode) is not None:
            return []  # the sum of an all-reduce
        found = [re.search(rf"{key}=%?([\w.\-]+)", instruction.attributes) for key in _CALLS]
        return [match[1] for match in found if match]

    def _distance_from_balanced(self, computation: str) -> tuple[int, int]:
        return self._in_loops(computation), self._work(computation).collectives.total()

    def _in_loops(self, computation: str) -> int:
        """Collectives inside loops."""
        total = 0
        for instruction in self._computations[computation]:
            for name in self._called(instruction):
                looped = instruction.opcode == "while"
                total += self._work(name).collectives.total() if looped else self._in_loops(name)
        return total


def collective(opcode: str) -> str | None:
    """The kind of collective that an instruction begins, None if none."""
    kind = opcode.removesuffix("-start")
    return kind if kind in COLLECTIVES else None


def branches(instruction: Instruction) -> list[str]:
    """The computations of which a conditional runs one; empty for all else."""
    if instruction.opcode != "conditional":
        return []
    listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
    if listed:
        return [name.strip().lstrip("%") for name in listed[1].split(",")]
    return re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", instruction.attributes)


def _instruction(name: str, rest: str) -> Instruction:
    shape, rest = _closed(rest) if rest.startswith("(") else rest.split(" ", 1)
    opcode, rest = re.match(r"\s*([\w\-]+)(.*)$", rest).groups()
    inside, attributes = _closed(rest)
    return Instruction(name, shape, opcode, tuple(re.findall(r"%([\w.\-]+)", inside)), attributes)


def _closed(text: str) -> tuple[str, str]:
    """(the parenthesis that `text` begins with, the rest)."""
    depth = 0
    for index, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[: index + 1], text[index + 1 :]
    raise ValueError(f"a parenthesis stays open in {text[:80]}")


def _sizes(shape: str) -> list[tuple[str, list[int]]]:
    return [(d, [int(n) for n in dims.split(",") if n]) for d, dims in _ARRAY.findall(shape)]


def _result_bytes(instruction: Instruction) -> int:
    """Of a `-start`, whose shape lists operands too, the largest array; else all."""
    sizes = [_BYTES.get(d, 4) * math.prod(dims) for d, dims in _sizes(instruction.shape)]
    return max(sizes) if instruction.opcode.endswith("-start") else sum(sizes)


def _dot_flops(instruction: Instruction, shapes: dict[str, str]) -> int:
    ((_, out),) = _sizes(instruction.shape)
    left = _sizes(shapes[instruction.operands[0]])[0][1]
    axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
    inner = [left[int(axis)] for axis in axes[1].split(",") if axis] if axes else []
    return 2 * math.prod(out) * math.prod(inner)
