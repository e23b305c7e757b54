"""What one run of a program does: its collectives, products and memory traffic, loops multiplied.

Of a conditional the branch of a balanced routing counts: the one without collectives in loops, and
of such the one with the fewest; of branches whose collectives are the same, the one with most
products. A loop runs as often as XLA says; where its length depends on
values (tiles of rows, rounds) it counts once and is reported.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from moejax.planning import replica_groups
from moejax.planning.hlo import Array, Instruction, Module
from moejax.planning.loops import trip_count
from moejax.planning.products import flops_of
from moejax.planning.traffic import bytes_moved, bytes_of_collective, main_bytes

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)


SLICE = "slice"  # stands for a mesh axis in what slices of TPUs send each other
_BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="(\w+)"')


class Exchange(NamedTuple):
    """One kind of collective call.

    Attributes:
      kind: of `KINDS`.
      axes: of the mesh, along which its devices differ; empty for none, `SLICE` between slices.
      size: devices of a group.
      num_bytes: of the whole array on one device: what is gathered, reduced, scattered or sent,
        own part included.
    """

    kind: str
    axes: tuple[str, ...]
    size: int
    num_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What one device executes.

    Attributes:
      exchanges: how often each is called.
      flops: of products (`dot` and `convolution`), but for those in loops of open length.
      traffic: bytes read from and written to main memory.
      kernels: how often each custom call is called: its work is not known to XLA.
      open_loops: how often a loop is entered whose length depends on values. What is in it counts
        once, products not at all.
      open_exchanges: collectives in such loops.
      tied: how often a conditional is met whose branches differ in products and not in collectives.
    """

    exchanges: collections.Counter[Exchange] = dataclasses.field(
        default_factory=collections.Counter
    )
    flops: float = 0
    traffic: float = 0
    kernels: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    open_loops: int = 0
    open_exchanges: int = 0
    tied: int = 0

    def plus(self, other: Work, times: int = 1) -> Work:
        """Both, the other so often."""
        add = lambda a, b: a + collections.Counter({k: n * times for k, n in b.items()})
        return Work(
            exchanges=add(self.exchanges, other.exchanges),
            flops=self.flops + times * other.flops,
            traffic=self.traffic + times * other.traffic,
            kernels=add(self.kernels, other.kernels),
            open_loops=self.open_loops + times * other.open_loops,
            open_exchanges=self.open_exchanges + times * other.open_exchanges,
            tied=self.tied + times * other.tied,
        )


def work_of(module: Module, sizes: Mapping[str, int], *, num_slices: int = 1) -> Work:
    """What a program does on the path of a balanced routing.

    A program for several slices of TPUs is that of one slice: its collectives stay within, and what
    leaves it is sent through the hosts, after it was reduced or scattered within.

    Args:
      module: read by `hlo.read`.
      sizes: {axis: size} of the mesh that it was compiled for, `data` first.
      num_slices: over which `data` is split.
    """
    if num_slices > 1:
        first = next(iter(sizes))
        sizes = {**sizes, first: sizes[first] // num_slices}
    return _Walk(module, sizes, num_slices).computation(module.entry)


def kind_of(instruction: Instruction) -> str | None:
    """The kind of collective that an instruction begins, None if none."""
    kind = instruction.opcode.removesuffix("-start")
    return kind if kind in KINDS else None


class _Walk:
    def __init__(self, module: Module, sizes: Mapping[str, int], num_slices: int):
        self._module, self._sizes, self._num_slices = module, sizes, num_slices
        self._known: dict[tuple[str, bool], Work] = {}
        self._shapes: dict[str, dict[str, Instruction]] = {}

    def computation(self, name: str, *, fused: bool = False) -> Work:
        """Of everything in it; the inside of a fusion moves nothing through main memory."""
        key = name, fused
        if key not in self._known:
            total = Work()
            for instruction in self._module.computations[name]:
                total = total.plus(*self._instruction(instruction, name, fused))
            self._known[key] = total
        return self._known[key]

    def _instruction(self, instruction: Instruction, where: str, fused: bool) -> tuple[Work, int]:
        """(what one run of it does, how often it runs)."""
        opcode = instruction.opcode
        lines = self._lines(where)
        if kind := kind_of(instruction):
            moved = 0 if fused else bytes_of_collective(instruction, lines)
            return self._exchange(instruction, kind, lines, moved), 1
        if opcode == "send" and (found := _BETWEEN_SLICES.search(instruction.attributes)):
            num_bytes = sum(a.num_bytes for a in lines[instruction.operands[0]].arrays)
            kind = found[1].lower().replace("_", "-")
            call = Exchange(kind, (SLICE,), self._num_slices, num_bytes)
            # Read here, and as much is written where it is received.
            moved = 2 * main_bytes(lines[instruction.operands[0]].arrays)
            return Work(exchanges=collections.Counter({call: 1}), traffic=moved), 1
        if opcode.endswith(("-done", "-update")):
            return Work(), 1  # counted where it started
        if opcode == "while":
            body = self.computation(instruction.called[0])
            times = trip_count(instruction, lines, self._module)
            if times is not None:
                return body, times
            inside = sum(body.exchanges.values())
            return dataclasses.replace(body, flops=0, open_loops=1, open_exchanges=inside), 1
        if opcode == "conditional":
            name, tied = self._branch(instruction)
            return self.computation(name).plus(Work(tied=tied)), 1
        parts = Work()
        moved = 0 if fused else bytes_moved(instruction, lines, self._module)
        if opcode == "fusion" and (scatter := self._reduce_scatter(instruction, moved)):
            return scatter, 1
        for name in instruction.called:
            if opcode in ("call", "call-start", "async-start", "fusion"):
                parts = parts.plus(self.computation(name, fused=fused or opcode == "fusion"))
        flops = flops_of(instruction, lines)
        kernels = collections.Counter()
        if opcode == "custom-call":
            target = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
            kernels[target[1] if target else "unnamed"] += 1
        return parts.plus(Work(flops=flops, traffic=moved, kernels=kernels)), 1

    def _exchange(self, instruction: Instruction, kind: str, lines, moved: float) -> Work:
        found = replica_groups.groups(instruction.attributes, math.prod(self._sizes.values()))
        axes = replica_groups.spanned(found, self._sizes)
        size = max(len(group) for group in found)
        given = [a for o in instruction.operands if o in lines for a in lines[o].arrays]
        num_bytes = _whole_bytes(kind, instruction, given)
        call = Exchange(kind, axes, size, num_bytes)
        return Work(exchanges=collections.Counter({call: 1}), traffic=moved)

    def _reduce_scatter(self, fusion: Instruction, moved: float) -> Work | None:
        """TPUs write one as an all-reduce of which each device takes its part, in one fusion."""
        inside = [i for name in fusion.called for i in self._module.computations[name]]
        sums = [i for i in inside if kind_of(i) == "all-reduce"]
        if len(sums) != 1 or not any(i.opcode == "dynamic-slice" for i in inside):
            return None
        return self._exchange(sums[0], "reduce-scatter", {i.name: i for i in inside}, moved)

    def _branch(self, conditional: Instruction) -> tuple[str, bool]:
        """(the branch that counts, whether products alone have chosen it)."""
        first = min(conditional.called, key=self._distance)
        calls, distance = self.computation(first).exchanges, self._distance(first)
        alike = [
            name
            for name in conditional.called
            if self._distance(name) == distance and self.computation(name).exchanges == calls
        ]
        products = [self.computation(name).flops for name in alike]
        most = alike[products.index(max(products))]
        return most, min(products) < max(products)

    def _distance(self, computation: str) -> tuple[int, int]:
        """How far a branch is from that of a balanced routing."""
        return self._in_loops(computation), sum(self.computation(computation).exchanges.values())

    def _in_loops(self, computation: str) -> int:
        """Collectives inside loops."""
        total = 0
        for instruction in self._module.computations[computation]:
            names = instruction.called
            if instruction.opcode == "conditional":
                names = (self._branch(instruction)[0],)
            for name in names:
                if instruction.opcode == "while":
                    total += sum(self.computation(name).exchanges.values())
                elif instruction.opcode in ("call", "conditional", "fusion"):
                    total += self._in_loops(name)
        return total

    def _lines(self, computation: str) -> dict[str, Instruction]:
        if computation not in self._shapes:
            lines = self._module.computations[computation]
            self._shapes[computation] = {line.name: line for line in lines}
        return self._shapes[computation]


def _whole_bytes(kind: str, instruction: Instruction, given: list[Array]) -> int:
    """Of the larger of what goes in and what comes out; a `-start` returns both, and marks."""
    operands = sum(a.num_bytes for a in given)
    results = sum(a.num_bytes for a in instruction.arrays)
    if instruction.opcode.endswith("-start"):
        marks = sum(a.num_bytes for a in instruction.arrays if a.dtype == "u32" and not a.dims)
        # Of an all-reduce in the spelling that names both, which counts twice here; the contracts
        # of H100s hold it so (it is less than 1 GB of a step there).
        both = kind != "all-reduce"
        results -= marks + (operands if both else 0)
    if kind == "ragged-all-to-all":  # operands are also the buffer that is written, and sizes
        return results
    return max(operands, results)
