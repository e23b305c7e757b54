"""Weighted mixtures of sources: which source gives the n-th row, for any n at any time."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence

import numpy as np

from moejax.data.errors import DataError
from moejax.data.source import OfFiles, Source

PERIOD = 2**16  # shares are exact to one row in this many


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
    """Several sources; of the training rows each gives a share proportional to its weight.

    A source that runs out starts its next epoch while others go on. The held-out split of a
    mixture is all held-out documents of all sources, without weights.

    Attributes:
      sources: the sources.
      weights: one positive number per source; only their ratios matter.
    """

    sources: tuple[Source, ...]
    weights: tuple[float, ...]

    def check(self) -> None:
        if len(self.sources) != len(self.weights) or not self.sources:
            raise DataError(
                f"Mixture has {len(self.sources)} sources and {len(self.weights)} weights: give "
                "one weight per source"
            )
        bad = [w for w in self.weights if not (math.isfinite(w) and w > 0)]
        if bad:
            raise DataError(f"Mixture weight {bad[0]} is not a positive number: drop that source")


def check_apart(sources: Sequence[Source]) -> None:
    """Raises DataError where held-out text would be trained on, or counted twice.

    So it is where a file belongs to two sources that hold it out by other rules, and where a source
    is there twice.
    """
    seen: dict[str, tuple] = {}
    for number, source in enumerate(sources):
        if source in sources[:number]:
            first = sources.index(source)
            raise DataError(
                f"source {number} of the mixture is source {first} again: add up their weights"
            )
        if not isinstance(source, OfFiles):
            continue
        for name, path in source.files():
            rule = (source.unit, name, source.holdout_every)
            first, other = seen.setdefault(os.path.realpath(path), (number, rule))
            if other != rule:
                raise DataError(
                    f"{str(path)!r} belongs to sources {first} and {number} of the mixture, and "
                    "what one of them holds out the other may train on: give them other folders"
                )


class Turns:
    """Whose turn it is. Source k gets `counts[k]` of every `PERIOD` rows, evenly spread."""

    def __init__(self, weights: tuple[float, ...]):
        period = PERIOD if len(weights) > 1 else 1
        self._counts = _shares(weights, period)
        times = [(np.arange(c) + 0.5) / c for c in self._counts]
        owner = np.repeat(np.arange(len(weights)), self._counts)
        self._owner = owner[np.argsort(np.concatenate(times), kind="stable")]
        self._turn = np.empty(period, np.int64)  # how many turns its owner had before
        for k, count in enumerate(self._counts):
            self._turn[self._owner == k] = np.arange(count)

    def __call__(self, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, row number within that source's endless sequence) of the n-th rows [m]."""
        rounds, slot = np.divmod(n, len(self._owner))
        source = self._owner[slot]
        return source, rounds * self._counts[source] + self._turn[slot]


def _shares(weights: tuple[float, ...], period: int) -> np.ndarray:
    """Integers in the ratio of the weights that add up to `period` (largest remainder)."""
    exact = np.array(weights, np.float64) / math.fsum(weights) * period
    counts = np.floor(exact).astype(np.int64)
    rest = np.argsort(counts - exact, kind="stable")[: period - int(counts.sum())]
    counts[rest] += 1
    if counts.min() < 1:
        k = int(counts.argmin())
        raise DataError(
            f"Mixture weight {weights[k]} is less than one row in {period}: raise it or drop it"
        )
    return counts
