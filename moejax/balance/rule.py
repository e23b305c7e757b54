"""What a balance rule is, with the neutral version of each method."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from jaxtyping import Array, Float

from moejax.types import Context, Routing, Stats, Terms

CORRECTION_BIAS = "correction_bias"  # the name of state that takes part in selection


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """Neutral: no terms, no state, no bias. `name` is the key of the rule's loss term, if any.

    A rule with a name has a field `weight`, the factor on that term in the loss. `loads` says where
    `context.loads` must come from when a step has several microbatches: None (it is not read) or
    `two_pass` (a first pass over the whole batch). `mesh_dependent` rules give another result on
    another mesh, and with another number of microbatches.
    """

    name: ClassVar[str] = ""
    loads: ClassVar[Literal["two_pass"] | None] = None
    mesh_dependent: ClassVar[bool] = False

    def state(self, num_experts: int) -> dict[str, Array]:
        """What the rule remembers between steps, as it starts.

        What takes part in selection is named `CORRECTION_BIAS`: it belongs to the model, so it is
        frozen with the router, exported, and needed by whoever starts from it. All else is a
        statistic of the training.
        """
        return {}

    def selection_bias(self, state: dict[str, Array]) -> Float[Array, "E"] | None:
        """What to add to the router's scores, for selection only."""
        return None

    def terms(self, routing: Routing, context: Context, state: dict[str, Array]) -> Terms:
        """Unweighted (sum, count) pairs of one forward pass; padding counts in neither."""
        return {}

    def update(self, state: dict[str, Array], stats: Stats) -> dict[str, Array]:
        """The next state, from `stats` ("load" `[E]` and others) of the whole step."""
        return state
