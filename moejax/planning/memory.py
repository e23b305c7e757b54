"""Where a device's memory goes: the state by kind, the batch, and what the program needs."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import jax

from moejax.planning.compile import CompiledStep
from moejax.types import named_leaves

# First key of a leaf of the state -> kind; whatever is not named here is "other state".
_KINDS = {"params": "parameters", "frozen": "frozen parameters", "opt_state": "optimiser"}
OTHER, BATCH = "other state", "batch"
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on the device that holds most; all do, as XLA compiles one program for all.

    Attributes:
      held: {kind: bytes} of arguments, as their shards add up without padding.
      padding: what their layouts add on the device. Arguments are `held` and this.
      temporaries: gradients, activations and all else that lives during the step.
      results: what is returned and does not lie where an argument was.
      code: of the program.
      needed: the sum of all; an estimate of the compiler's where it refused the program.
      capacity: what the device has, None where that is not known.
    """

    held: dict[str, int]
    padding: int | None
    temporaries: int | None
    results: int | None
    code: int | None
    needed: int | None
    capacity: int | None

    @property
    def fits(self) -> bool:
        """False only where it is known not to fit."""
        return None in (self.needed, self.capacity) or self.needed <= self.capacity


@dataclasses.dataclass(frozen=True, kw_only=True)
class Copied:
    """A leaf of the state of which several devices hold the same part.

    Attributes:
      path: in the state.
      num_bytes: of the part, on each device.
      copies: devices that hold the same.
    """

    path: str
    num_bytes: int
    copies: int


def memory_of(step: CompiledStep, capacity: int | None) -> Memory:
    """What a compiled step needs on a device of so many bytes; less is known of a refused one."""
    held = by_kind(step)
    if step.program is None:
        refusal = step.refusal or ""
        needed = needed_by_refusal(refusal) or 0
        if "HLO temporaries" in refusal:  # and says nothing of the arguments
            needed += sum(held.values())
        return Memory(
            held=held,
            padding=None,
            temporaries=None,
            results=None,
            code=None,
            needed=max(needed, (capacity or 0) + 1),  # else it would not have refused
            capacity=capacity,
        )
    stats = step.program.memory_analysis()
    parts = {
        "padding": max(stats.argument_size_in_bytes - sum(held.values()), 0),
        "temporaries": stats.temp_size_in_bytes,
        "results": stats.output_size_in_bytes - stats.alias_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
    }
    # The compiler leaves out arguments that the program does not use; they are there all the same.
    needed = sum(held.values()) + sum(parts.values())
    return Memory(held=held, **parts, needed=needed, capacity=capacity)


def by_kind(step: CompiledStep) -> dict[str, int]:
    """{kind: bytes on one device} of the state and the batch, kinds with nothing left out."""
    found: dict[str, int] = {}
    for path, leaf in named_leaves(step.state).items():
        kind = _KINDS.get(path.partition("/")[0], OTHER)
        found[kind] = found.get(kind, 0) + shard_bytes(leaf)
    found[BATCH] = sum(map(shard_bytes, jax.tree.leaves(step.batch)))
    return found


def shard_bytes(leaf: Any) -> int:
    """Of an abstract array with a sharding: bytes of the largest part on one device."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * _itemsize(leaf)


def most_copied(step: CompiledStep, count: int) -> list[Copied]:
    """The leaves of the state that take most memory twice or more, largest first."""
    found = []
    for path, leaf in named_leaves(step.state).items():
        part = math.prod(leaf.sharding.shard_shape(leaf.shape))
        whole = math.prod(leaf.shape)
        copies = step.mesh.size * part // max(whole, 1)
        if copies > 1 and part:
            found.append(Copied(path=path, num_bytes=shard_bytes(leaf), copies=copies))
    return sorted(found, key=lambda c: -c.num_bytes)[:count]


def needed_by_refusal(text: str) -> int | None:
    """The bytes that XLA says a program needs that it refuses; None where it says nothing."""
    patterns = (
        r"Used ([\d.]+)([KMGT]?) of",
        r"total memory required for HLO \w+ \(([\d.]+)([KMGT]?)\)",
        r"required[^()]*\(([\d.]+)([KMGT]?)\)",
    )
    for pattern in patterns:
        if found := re.search(pattern, text):
            return int(float(found[1]) * _UNITS[found[2]])
    return None


def _itemsize(leaf: Any) -> int:
    """Of a random key, its words."""
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        words = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct((), leaf.dtype))
        return words.size * words.dtype.itemsize
    return leaf.dtype.itemsize
