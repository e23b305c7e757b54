"""Which checkpoints to keep.

A run that goes on from an earlier step sets aside the later checkpoints as `*.superseded`. Such a
step is kept until the new timeline has `last` checkpoints of that step or later on storage, each
with a manifest that is as it was written: as many as the run has to fall back on at any time.
Before that the newest sound state may be the one that was set aside. `every` and `best` do not
apply to it, and with `last=None` it is kept for good.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence

from moejax.errors import UserError
from moejax.train.manifest import CorruptCheckpoint, Manifest
from moejax.train.step_directory import StepDirectory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Keep:
    """Keeps a checkpoint that any of the rules wants; the newest is always kept.

    The `last` newest (None: all), those whose step is a multiple of `every`, and the `best` ones
    with the lowest finite `extra["metrics"][metric]`.
    """

    last: int | None = 3
    every: int | None = None
    best: int = 0
    metric: str = "loss"

    def __post_init__(self):
        if (self.last is not None and self.last < 1) or self.best < 0:
            raise UserError(f"Keep: last={self.last} must be 1 or more, best={self.best} 0 or more")
        if self.every is not None and self.every < 1:
            raise UserError(f"Keep: every={self.every} must be 1 or more; None turns it off")

    def wanted(self, steps: Sequence[int], metrics: Mapping[int, Mapping[str, float]]) -> set[int]:
        """The steps to keep out of `steps` (ascending); `metrics` maps a step to its metrics."""
        kept = set(steps if self.last is None else steps[-self.last :])
        if self.every is not None:
            kept |= {step for step in steps if step % self.every == 0}
        values = {step: metrics.get(step, {}).get(self.metric) for step in steps}
        finite = [s for s, v in values.items() if isinstance(v, int | float) and math.isfinite(v)]
        return kept | set(sorted(finite, key=lambda s: (values[s], -s))[: self.best])

    def wanted_superseded(self, superseded: Collection[int], steps: Sequence[int]) -> set[int]:
        """The steps to keep out of `superseded`; `steps` are the readable ones of the timeline."""
        enough = len(steps) + 1 if self.last is None else self.last
        return {step for step in superseded if sum(s >= step for s in steps) < enough}

    def apply(self, directory: StepDirectory, manifest: Callable[[int], Manifest]) -> None:
        """Deletes what no rule wants. `manifest` reads that of a step, or raises."""
        steps = directory.steps()
        metrics = {s: _metrics(manifest, s) for s in steps} if self.best else {}
        for step in set(steps) - self.wanted(steps, metrics):
            directory.delete(directory.path(step))
        superseded = directory.superseded()
        if superseded:
            sound = [s for s in directory.steps() if _is_readable(manifest, s)]
            wanted = self.wanted_superseded(set(superseded.values()), sound)
            for path in (p for p, step in superseded.items() if step not in wanted):
                directory.delete(path)


def _is_readable(manifest: Callable[[int], Manifest], step: int) -> bool:
    try:
        return manifest(step).step == step
    except (CorruptCheckpoint, UserError):  # damaged, or of another version's format
        return False


def _metrics(manifest: Callable[[int], Manifest], step: int) -> dict[str, float]:
    try:
        return manifest(step).extra.get("metrics") or {}
    except CorruptCheckpoint:
        return {}
