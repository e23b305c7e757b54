"""Expert parallelism whose memory is bounded whatever the router does, and that drops nothing.

Least-loaded expert parallelism, Nguyen et al., arXiv 2601.17111: where a device has more rows than
its share, some of its experts' rows go to the least loaded devices, and those experts' weights with
them. A device never holds more than max(alpha, skip_below) times the mean rows; where no plan has
room in `num_slots` foreign experts, the rows are computed in several rounds.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from moejax.errors import UserError
from moejax.kernels.expert_mlp.slots import sort_slots
from moejax.parallel.fetch import joined, with_foreign
from moejax.parallel.planned_rows import (
    by_destination,
    journey,
    local_experts,
    not_computed,
    there_and_back,
)
from moejax.parallel.rebalance import ALPHA, SKIP_BELOW, rebalance, split_by_source
from moejax.parallel.rounds import in_rounds
from moejax.parallel.token_shards import (
    counts_of_all,
    most_anywhere,
    num_owners,
    on_token_shards,
)
from moejax.types import Routing


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeastLoaded:
    """Dropless, exact, and bounded.

    Attributes:
      alpha: rows that a plan allows a device, over the mean.
      skip_below: while no device has more than this times the mean, experts stay where they are.
      min_chunk: rows that are worth moving an expert's weights for, whatever the size of the
        expert: `parallel.rebalance.min_chunk_from` of measured FLOP/s and bytes/s (1,100 for
        bfloat16 at the paper's 495 TFLOP/s and 450 GB/s on H200s).
      num_slots: foreign experts that a device can hold at a time, at most its own number.
      room: rows that a device can hold at a time, over the mean; None for what the plans need. With
        less, or where the slots do not suffice, rows are computed in several rounds.
      exchange: a backend of `parallel.exchange`; None picks by platform.
    """

    alpha: float = ALPHA
    skip_below: float = SKIP_BELOW
    min_chunk: int = 1024
    num_slots: int = 4
    room: float | None = None
    exchange: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("alpha", 1), ("skip_below", 1), ("min_chunk", 1), ("num_slots", 1)):
            if getattr(self, name) < least:
                raise UserError(f"transport.{name}={getattr(self, name)} must be at least {least}")
        if self.room is not None and self.room <= 0:
            raise UserError(f"transport.room={self.room} must be above 0, or None")

    def __call__(
        self,
        x: Float[Array, "T D"],
        routing: Routing,
        weights: Any,
        compute: Callable[..., Array],
        *,
        axes: Any = None,
    ) -> tuple[Float[Array, "T D"], dict[str, Array]]:
        body = functools.partial(self._per_device, compute, routing.probs.shape[-1])
        return on_token_shards(body, x, routing, weights, axes, split=("expert", "tensor"))

    def _per_device(self, compute, num_experts, x, experts, gate, weights):
        num_devices = num_owners()
        if num_devices == 1:
            zero = jnp.zeros((), jnp.int32)
            counts = {"dropped": zero, "foreign_experts": zero, "extra_rounds": zero}
            return compute(x, experts, gate, weights), counts
        num_slots = min(self.num_slots, num_experts // num_devices)
        # Enough for a plan of one owner per helper, whatever the loads; see `rebalance`.
        enough = max(self.alpha, self.skip_below)
        room = min(enough if self.room is None else self.room, num_devices)
        num_rows = _whole_tiles(max(math.ceil(room * experts.size), 1))
        by_expert = sort_slots(experts, num_experts)
        counts = counts_of_all(by_expert.group_sizes)  # [P, E]
        plan = rebalance(
            counts.sum(axis=0),
            num_devices,
            alpha=self.alpha,
            skip_below=self.skip_below,
            min_chunk=self.min_chunk,
            num_rows=num_rows,
            num_slots=num_slots,
        )
        me = lax.axis_index("expert")
        split = split_by_source(plan.rows, counts)  # [source, expert, destination]
        places = local_experts(me, num_experts, num_experts // num_devices, plan.slots[me])
        needed, has_foreign = most_anywhere((plan.most_rows, plan.has_foreign))
        own, foreign = with_foreign(
            weights, plan.slots, has_foreign > 0, x.dtype, "expert", self.exchange
        )
        beside = lambda v, w: lax.stop_gradient(jnp.concatenate([v.astype(x.dtype), w]))
        floats = (x, gate, own, foreign)
        fixed = (jax.tree.map(beside, own, foreign), by_destination(by_expert, split[me]), split)
        one_round, fixed = self._one_round(compute, num_rows), (*fixed, places)
        if room >= enough and num_slots == num_experts // num_devices:
            num_rounds, y = 1, one_round(floats, fixed, None)  # there is a plan for every load
        else:
            num_rounds = jnp.where(needed <= num_rows, 1, -(-needed // _part(num_rows)))
            y = in_rounds(one_round, floats, fixed, num_rounds)
        return y, {
            "dropped": not_computed(
                by_expert,
                split[:, :, me],
                places,
                num_places=num_experts // num_devices + num_slots,
                room=jnp.where(num_rounds == 1, num_rows, num_rounds * _part(num_rows)),
            ),
            "foreign_experts": jnp.sum(plan.slots[me] < num_experts, dtype=jnp.int32),
            "extra_rounds": jnp.where(me == 0, num_rounds - 1, 0),
        }

    def _one_round(self, compute, num_rows: int):
        """All rows at once, or the n-th part where there is no room for all at once.

        Such parts are of half the rows, because the sums of their gradients need memory too.
        """

        def one_round(floats, fixed, nth):
            x, gate, own, foreign = floats
            held, slots, split, places = fixed
            me = lax.axis_index("expert")
            room = num_rows if nth is None else _part(num_rows)
            trip = journey(slots, split, places, me, num_rows=room, nth=nth)
            weights = jax.tree.map(lambda *parts: joined(parts[:2], parts[2]), own, foreign, held)
            return there_and_back(compute, x, gate, weights, trip, backend=self.exchange)

        return one_round


def _part(num_rows: int) -> int:
    return _whole_tiles(-(-num_rows // 2))


def _whole_tiles(num_rows: int) -> int:
    """Rounded up, so that no kernel has to copy the rows to fill up its tiles."""
    tile = 128 if num_rows >= 1024 else 8
    return -(-num_rows // tile) * tile
