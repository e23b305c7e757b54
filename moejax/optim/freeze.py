"""Splits parameters into trainable and frozen, before the gradient is taken.

Masking after the gradient would still form gradients and optimizer state for frozen leaves, and
weight decay would still move them. Here the loss is differentiated with respect to the trainable
part alone: `value_and_grad(lambda t: loss(merge(t, frozen)))(trainable)`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax

from moejax.errors import UserError
from moejax.optim.paths import map_named, match_all, matches
from moejax.types import named_leaves

TRAIN_ALL = ("*",)


def split(params: Any, trainable: tuple[str, ...] = TRAIN_ALL) -> tuple[Any, Any]:
    """(trainable, frozen): both have the structure of `params`, with None for the other's leaves.

    jax treats None as an empty subtree, so neither gradients nor moments exist for it.
    `trainable` holds globs over paths. Raises UserError for a pattern that matches nothing.
    """
    match_all(trainable, list(named_leaves(params)), field="trainable")
    chosen = map_named(lambda path, x: x if matches(path, trainable) else None, params)
    rest = map_named(lambda path, x: None if matches(path, trainable) else x, params)
    return chosen, rest


def merge(trainable: Any, frozen: Any) -> Any:
    """The inverse of `split`; each leaf comes from the side that has it."""

    def pick(a, b):
        if (a is None) == (b is None):
            raise ValueError("merge: a leaf must be in exactly one of the two parts")
        return b if a is None else a

    return jax.tree.map(pick, trainable, frozen, is_leaf=lambda x: x is None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FreezeReport:
    """What `split` would do: counts of numbers, and bytes, on each side."""

    matched: dict[str, int]  # leaves per pattern
    num_trainable: int
    num_frozen: int
    trainable_bytes: int
    frozen_bytes: int

    def __str__(self) -> str:
        total = self.num_trainable + self.num_frozen
        share = 100.0 * self.num_trainable / max(total, 1)
        patterns = ", ".join(f"{p!r}: {n} leaves" for p, n in self.matched.items())
        return (
            f"{self.num_trainable:,} of {total:,} parameters train ({share:.2f}%, "
            f"{self.trainable_bytes / 1e6:.1f} MB); {self.num_frozen:,} are frozen "
            f"({self.frozen_bytes / 1e6:.1f} MB); {patterns}"
        )


def report(params: Any, trainable: tuple[str, ...] = TRAIN_ALL) -> FreezeReport:
    """Counts what `split(params, trainable)` gives; `params` may be ShapeDtypeStructs."""
    leaves = named_leaves(params)
    matched = match_all(trainable, list(leaves), field="trainable")
    sizes = {True: [0, 0], False: [0, 0]}
    for path, leaf in leaves.items():
        side, num = sizes[matches(path, trainable)], math.prod(leaf.shape)
        side[0] += num
        side[1] += num * leaf.dtype.itemsize
    if not leaves:
        raise UserError("trainable: the model has no parameters to train")
    return FreezeReport(
        matched=matched,
        num_trainable=sizes[True][0],
        num_frozen=sizes[False][0],
        trainable_bytes=sizes[True][1],
        frozen_bytes=sizes[False][1],
    )
