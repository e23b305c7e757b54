"""What one forward pass of a model gives."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxtyping import Array, Float

from moejax.types import Stats, Terms, pytree

Variables = dict[str, Any]


@pytree
class Output:
    """What one forward pass gives.

    Attributes:
      logits: at least float32 `[B, S, V]`.
      terms: unweighted (sum, count) pairs over tokens and layers.
      stats: `{segment: {statistic: [count, ...]}}`.
      cache: the new decoding cache (empty unless decoding).
      measures: (sum, count) pairs that enter no loss, `{name/layer: ...}`.
      log_prob: of all that adapters drew for each row of the batch; None where nothing was drawn.
    """

    logits: Float[Array, "B S V"]
    terms: Terms
    stats: Stats
    cache: Variables
    measures: Terms = dataclasses.field(default_factory=dict)
    log_prob: Float[Array, " B"] | None = None


@pytree
class Passed:
    """What the layers made of their input: `x` `[B, S, D]`, and otherwise as in `Output`."""

    x: Float[Array, "B S D"]
    terms: Terms
    stats: Stats
    cache: Variables
    measures: Terms
    log_prob: Float[Array, " B"] | None

    def output(self, logits: Float[Array, "B S V"]) -> Output:
        """With the head's answer in the place of x."""
        others = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "x"}
        return Output(logits=logits, **others)
