"""Splits parameters into trainable and frozen, before the gradient is taken.

Masking after the gradient would still form gradients and optimizer state for frozen leaves, and
weight decay would still move them. Here the loss is differentiated with respect to the trainable
part alone: `value_and_grad(lambda t: loss(merge(t, frozen)))(trainable)`.

Patterns are those of `paths.py`. `*/experts/*@expert=3` (or `=3,7`) trains these experts of leaves
in which all experts are stacked. Such a leaf trains whole as far as memory goes: its gradient and
its state exist for all experts, and `only_experts` keeps them from reaching the others.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from moejax.errors import UserError
from moejax.optim.paths import map_named, match_all, matches
from moejax.types import named_leaves

TRAIN_ALL = ("*",)


def split(params: Any, trainable: tuple[str, ...] = TRAIN_ALL) -> tuple[Any, Any]:
    """(trainable, frozen): both have the structure of `params`, with None for the other's leaves.

    jax treats None as an empty subtree, so neither gradients nor moments exist for it.
    `trainable` holds patterns over paths. Raises UserError for one that matches nothing.
    """
    patterns = tuple(_Pattern.parse(text).paths for text in trainable)
    match_all(patterns, list(named_leaves(params)), field="trainable")
    chosen = map_named(lambda path, x: x if matches(path, patterns) else None, params)
    rest = map_named(lambda path, x: None if matches(path, patterns) else x, params)
    return chosen, rest


def merge(trainable: Any, frozen: Any) -> Any:
    """The inverse of `split`; each leaf comes from the side that has it."""

    def pick(a, b):
        if (a is None) == (b is None):
            raise ValueError("merge: a leaf must be in exactly one of the two parts")
        return b if a is None else a

    return jax.tree.map(pick, trainable, frozen, is_leaf=lambda x: x is None)


@dataclasses.dataclass(frozen=True)
class _Pattern:
    paths: str
    experts: tuple[int, ...] | None  # None: all

    @classmethod
    def parse(cls, text: str) -> _Pattern:
        paths, at, chosen = text.partition("@")
        if not at:
            return cls(paths, None)
        if not re.fullmatch(r"expert=\d+(,\d+)*", chosen):
            raise UserError(f"trainable: {text!r} must end in @expert=3 or @expert=3,7")
        return cls(paths, tuple(map(int, chosen.removeprefix("expert=").split(","))))


@dataclasses.dataclass(frozen=True)
class Experts:
    """Of a leaf with all experts along `axis`: those that train."""

    axis: int
    chosen: tuple[int, ...]


def name_experts(trainable: tuple[str, ...]) -> bool:
    """Whether any of the patterns ends in `@expert=`."""
    return any(_Pattern.parse(text).experts is not None for text in trainable)


def chosen_experts(
    params: Any, trainable: tuple[str, ...], axes: Mapping[str, int | None]
) -> dict[str, Experts]:
    """{path: which of its experts train}, of the leaves that patterns with `@expert=` match.

    A leaf that another pattern matches whole trains whole. `axes` says where a leaf's experts are
    (path -> axis or None). Raises UserError where a leaf has no experts or too few.
    """
    patterns = [_Pattern.parse(text) for text in trainable]
    whole = [pattern.paths for pattern in patterns if pattern.experts is None]
    found: dict[str, Experts] = {}
    for path, leaf in named_leaves(params).items():
        own = [p for p in patterns if p.experts is not None and matches(path, (p.paths,))]
        if not own or matches(path, whole):
            continue
        axis = axes.get(path)
        if axis is None:
            raise UserError(
                f"trainable: {own[0].paths}@expert=... matches {path}, which has no experts"
            )
        chosen = sorted({expert for pattern in own for expert in pattern.experts})
        if chosen[-1] >= leaf.shape[axis]:
            raise UserError(f"trainable: {path} has no expert {chosen[-1]}, but {leaf.shape[axis]}")
        found[path] = Experts(axis, tuple(chosen))
    return found


def only_experts(chosen: Mapping[str, Experts]) -> Callable[[Any], Any]:
    """A function that makes a tree (a gradient, an update) zero for all other experts.

    It selects, so that a NaN of an expert that does not train reaches nothing.
    """

    def select(path: str, leaf: jax.Array) -> jax.Array:
        if path not in chosen:
            return leaf
        own = chosen[path]
        index = jax.lax.broadcasted_iota(jnp.int32, leaf.shape, own.axis)
        trains = functools.reduce(jnp.logical_or, [index == expert for expert in own.chosen])
        return jnp.where(trains, leaf, 0)

    return lambda tree: map_named(select, tree)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FreezeReport:
    """What `split` would do: counts of numbers, and bytes, on each side.

    Of a leaf of which some experts train, the numbers of these count as trainable and all of its
    bytes, for that is what gradient and optimiser state take.
    """

    matched: dict[str, int]  # leaves per pattern
    num_trainable: int
    num_frozen: int
    trainable_bytes: int
    frozen_bytes: int
    partly: tuple[str, ...] = ()  # leaves of which some experts train

    def __str__(self) -> str:
        total = self.num_trainable + self.num_frozen
        share = 100.0 * self.num_trainable / max(total, 1)
        patterns = ", ".join(f"{p!r}: {n} leaves" for p, n in self.matched.items())
        return (
            f"{self.num_trainable:,} of {total:,} parameters train ({share:.2f}%, "
            f"{self.trainable_bytes / 1e6:.1f} MB); {self.num_frozen:,} are frozen "
            f"({self.frozen_bytes / 1e6:.1f} MB); {patterns}"
            + "".join(f"; of {path} some experts, with a whole gradient" for path in self.partly)
        )


def report(
    params: Any,
    trainable: tuple[str, ...] = TRAIN_ALL,
    chosen: Mapping[str, Experts] | None = None,
) -> FreezeReport:
    """Counts what `split(params, trainable)` gives; `params` may be ShapeDtypeStructs.

    `chosen` is from `chosen_experts`.
    """
    leaves = named_leaves(params)
    patterns = {text: _Pattern.parse(text).paths for text in trainable}
    matched = match_all(tuple(patterns.values()), list(leaves), field="trainable")
    sizes = {True: [0, 0], False: [0, 0]}
    for path, leaf in leaves.items():
        trains, num = matches(path, patterns.values()), math.prod(leaf.shape)
        sizes[trains][0] += num
        sizes[trains][1] += num * leaf.dtype.itemsize
    for path, own in (chosen or {}).items():
        shape = leaves[path].shape
        still = math.prod(shape) // shape[own.axis] * (shape[own.axis] - len(own.chosen))
        sizes[True][0] -= still
        sizes[False][0] += still
    if not leaves:
        raise UserError("trainable: the model has no parameters to train")
    return FreezeReport(
        matched={text: matched[paths] for text, paths in patterns.items()},
        num_trainable=sizes[True][0],
        num_frozen=sizes[False][0],
        trainable_bytes=sizes[True][1],
        frozen_bytes=sizes[False][1],
        partly=tuple(chosen or ()),
    )
