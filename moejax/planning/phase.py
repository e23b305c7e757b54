"""The part of a run that a plan is about, where what the model computes depends on the step."""

from __future__ import annotations

import collections
import dataclasses
import itertools

from moejax.models.transformer import Transformer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """Steps that all compute alike.

    Attributes:
      model: as it computes then, without a switch.
      first: of these steps. count: how many there are. steps: of the whole run.
    """

    model: Transformer
    first: int
    count: int
    steps: int

    def __str__(self) -> str:
        return f"the {self.count:,} of {self.steps:,} steps that compute like step {self.first:,}"


def longest(model: Transformer, steps: int) -> Phase | None:
    """The phase with most of the steps, of equal ones the first; None where all steps are alike."""
    attention = model.block.attention
    if not hasattr(attention, "at_step"):
        return None
    stated = (getattr(attention, name, None) for name in ("from_step", "until_step"))
    edges = sorted({0, steps, *(step for step in stated if step is not None and 0 < step < steps)})
    counts, firsts = collections.Counter(), {}
    for first, end in itertools.pairwise(edges):
        key = repr(model.at_step(first).block.attention)
        counts[key] += end - first
        firsts.setdefault(key, first)
    (key, count), *others = counts.most_common()
    if not others:
        return None
    return Phase(model=model.at_step(firsts[key]), first=firsts[key], count=count, steps=steps)
