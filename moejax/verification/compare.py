"""How far two outcomes are apart: the largest relative error of each tensor, expert by expert."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from moejax.verification.outcome import Outcome

# An expert's gradient is a sum over few tokens and has digits however small it is. Other gradients
# may be zero but for rounding, like that of a key's bias, and need a higher floor in bfloat16.
EXPERT_FLOOR = 1e-3


@dataclasses.dataclass(frozen=True)
class Difference:
    """A tensor's largest error relative to the largest entry of the same expert.

    `expert` is the one it was found in, None for a tensor that has none.
    """

    name: str
    error: float
    expert: int | None


def compare(
    found: Outcome, oracle: Outcome, expert_axes: Mapping[str, int | None], *, floor: float
) -> list[Difference]:
    """One difference per tensor, in the oracle's order.

    Args:
      found, oracle: from `outcome`.
      expert_axes: {parameter: its axis of experts, or None}; gradients and updates of a parameter
        are compared along it, because an error in one expert is lost in the largest of all.
      floor: errors are relative to at least this share of the largest entry of all tensors of the
        group (all gradients, say): a gradient that is zero but for rounding has no digits to agree.
        Of experts to at least `EXPERT_FLOOR`, where that is lower.
    """
    if missing := oracle.keys() ^ found.keys():
        return [Difference(name, np.inf, None) for name in sorted(missing)]
    groups: dict[str, float] = {}
    for name, value in oracle.items():
        largest = float(np.abs(value).max(initial=0))
        groups[_group(name)] = max(groups.get(_group(name), 0.0), largest)
    differences = []
    for name in oracle:
        axis = expert_axes.get(name.partition(" ")[2])
        share = floor if axis is None else min(floor, EXPERT_FLOOR)
        least = share * groups[_group(name)]
        differences.append(_difference(name, found[name], oracle[name], axis, least))
    return differences


def _group(name: str) -> str:
    return name.partition(" ")[0]


def _difference(name: str, found, oracle, axis: int | None, least: float) -> Difference:
    if found.shape != oracle.shape:
        return Difference(name, np.inf, None)
    if axis is None:
        rows = (x.reshape(1, -1) for x in (found, oracle))
        return Difference(name, float(_error(*rows, least)[0]), None)
    by_expert = [np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1) for x in (found, oracle)]
    errors = _error(*by_expert, least)
    worst = int(np.argmax(errors))
    return Difference(name, float(errors[worst]), worst)


def _error(found: np.ndarray, oracle: np.ndarray, least: float) -> np.ndarray:
    """By row: the largest error over the largest entry; infinite where one is not finite."""
    found, oracle = (np.asarray(x, np.float64) for x in (found, oracle))
    with np.errstate(invalid="ignore", divide="ignore"):
        scale = np.maximum(np.abs(oracle).max(axis=1, initial=0), least)
        error = np.abs(found - oracle).max(axis=1, initial=0)
        relative = np.where(error == 0, 0, error / scale)
    return np.where(np.isnan(relative), np.inf, relative)
