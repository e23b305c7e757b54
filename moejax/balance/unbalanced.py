"""No balancing, said out loud: a model has to state its balancing, and this states none."""

from __future__ import annotations

import dataclasses

from moejax.balance.rule import Rule


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unbalanced(Rule):
    """Nothing pushes the router towards balance; for frozen routers and for experiments."""
