"""What a module inside a layer tells beside its result: loss terms, measures, log-probabilities.

Projections return an array and nothing else. What an adapter among them has to say it puts into
the collection `reports`, once; the stack takes it out of every layer's call and adds it up, so that
neither remat nor scan can count it twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

from moejax.types import Terms, add_terms, pytree

REPORTS = "reports"
_NAME = "report"


@pytree
class Report:
    """What one module, or a whole layer, tells.

    Attributes:
      terms: (sum, count) pairs that enter the loss with the weights of whoever made them.
      measures: (sum, count) pairs that are only reported.
      log_prob: of everything that was drawn for each row of the batch; None where nothing was.
    """

    terms: Terms
    measures: Terms
    log_prob: Float[Array, " B"] | None = None

    def __add__(self, other: Report) -> Report:
        drawn = [r.log_prob for r in (self, other) if r.log_prob is not None]
        return Report(
            terms=add_terms(self.terms, other.terms),
            measures=add_terms(self.measures, other.measures),
            log_prob=sum(drawn[1:], drawn[0]) if drawn else None,
        )


NOTHING = Report(terms={}, measures={})


def tell(module: nn.Module, report: Report) -> None:
    """Puts the report where the caller of the layer finds it, if he looks."""
    if module.is_mutable_collection(REPORTS) and not module.is_initializing():
        module.put_variable(REPORTS, _NAME, report)


def told(variables: Mapping[str, Any]) -> Report:
    """The sum of all reports of one call, given the variables that it changed."""
    return _sum(variables.get(REPORTS, {}))


def _sum(tree: Mapping[str, Any]) -> Report:
    total = NOTHING
    for name, value in tree.items():
        total = total + (value if name == _NAME else _sum(value))
    return total
