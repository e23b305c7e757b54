"""What a compiled program does on one path through its conditionals, summed by kind of collective.

Of each conditional the branch of a balanced routing: no foreign experts, one round. Loops count as
often as they run where that is known, else once (`moejax/planning/work.py`).
"""

from __future__ import annotations

import collections
import dataclasses

from moejax.planning import hlo
from moejax.planning.work import work_of


@dataclasses.dataclass(frozen=True)
class Work:
    """What one path executes.

    Attributes:
      collectives: how many of each kind.
      num_bytes: the larger of operands and results of those of each kind, in bytes on one device.
      flops: of products outside of kernels and of loops of open length.
    """

    collectives: collections.Counter[str]
    num_bytes: collections.Counter[str]
    flops: float


def balanced(text: str, num_devices: int = 8) -> Work:
    """Of the text of XLA's optimised HLO for so many devices."""
    work = work_of(hlo.read(text), {"device": num_devices})
    collectives, num_bytes = collections.Counter(), collections.Counter()
    for exchange, count in work.exchanges.items():
        collectives[exchange.kind] += count
        num_bytes[exchange.kind] += count * exchange.num_bytes
    return Work(collectives, num_bytes, work.flops)
