"""What an objective is: terms that are minimised and measures that are only reported."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
from jaxtyping import Array, ArrayLike, Int

from moejax.models.transformer import Transformer
from moejax.types import Batch, Stats, Terms


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """Terms that enter the loss, measures that do not, and per-layer statistics; all sums."""

    terms: Terms
    measures: Terms
    stats: Stats


jax.tree_util.register_dataclass(Result, data_fields=["terms", "measures", "stats"], meta_fields=[])


@runtime_checkable
class Objective(Protocol):
    """What a run minimises: the sum over its terms of weight * sum / count.

    The term `lm` is the cross-entropy in nats per token of the text that shall be modelled. The
    measure `bits_per_byte` is of all targets that count, so that it compares with compressors.

    An objective whose step computes every row several times says how often in `passes`. One that
    means nothing unless certain parameters train raises UserError in `check_trained`.
    """

    def weights(self, model: Transformer) -> dict[str, float]:
        """{term: factor in the total loss}."""
        ...

    def __call__(
        self,
        model: Transformer,
        variables: Any,
        batch: Batch,
        *,
        token_bytes: Int[ArrayLike, "V"],
        step: Array | int = 0,
        key: Array | None = None,
        loads: Any = None,
    ) -> Result:
        """Terms of one batch. `token_bytes[v]` is the number of UTF-8 bytes of token v."""
        ...


def check_trained(
    objective: Objective, model: Transformer, trained: Mapping[str, tuple[int, ...] | None]
) -> None:
    """Asks the objective, if it cares, whether what trains will do.

    `trained` is {path: which of the leaf's experts train, or None for all of the leaf}.
    """
    check = getattr(objective, "check_trained", None)
    if check is not None:
        check(model, trained)


def passes(objective: Objective) -> int:
    """How often a training step computes each row: the objective's `passes`, or once."""
    return getattr(objective, "passes", 1)
