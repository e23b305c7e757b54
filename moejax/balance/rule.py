"""What a balance rule is, with the neutral version of each method."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from jaxtyping import Array, Float

from moejax.types import Context, Routing, Stats, Terms


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """Neutral: no terms, no state, no bias. `name` is the key of the rule's loss term, if any.

    `loads` says where `context.loads` must come from when a step has several microbatches:
    `None` (not used), `two_pass` (a first pass over the whole batch) or `lagged` (the rule's own
    memory of the previous step). `mesh_dependent` rules give another result on another mesh.
    """

    name: ClassVar[str] = ""
    loads: ClassVar[Literal["two_pass"] | None] = None
    mesh_dependent: ClassVar[bool] = False

    def state(self, num_experts: int) -> dict[str, Array]:
        return {}

    def selection_bias(self, state: dict[str, Array]) -> Float[Array, "E"] | None:
        return None

    def terms(self, routing: Routing, context: Context, state: dict[str, Array]) -> Terms:
        return {}

    def update(self, state: dict[str, Array], stats: Stats) -> dict[str, Array]:
        return state
