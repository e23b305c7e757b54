"""Where a plan sends every row: what a device sends, and what its arrivals are.

A *plan* says how many of each expert's rows every device computes. The rows of an expert are
numbered by source device, then in the source's order, and dealt out in that order to the devices in
theirs. So every device can tell from the plan and the counts alone what arrives where, and only
rows travel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from moejax.kernels.expert_mlp.slots import Slots, rows_of_tokens, tokens_of_rows
from moejax.parallel.exchange import exchange


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Journey:
    """One device's part in one exchange there and back.

    Attributes:
      slots: its tokens' choices in the order in which their rows leave.
      sizes: rows from each device to each device.
      local: the local expert of each row that arrives; empty behind the last.
    """

    slots: Slots
    sizes: Int[Array, "P P"]
    local: Int[Array, " R"]


def local_experts(
    me: Array, num_experts: int, num_owned: int, slots: Int[Array, "F"]
) -> Int[Array, "E"]:
    """Each expert's place among a device's weights: its own first, then those in its slots.

    Experts that are not there get the place behind the last.
    """
    ids = jnp.arange(num_experts, dtype=jnp.int32) - me * num_owned
    nowhere = num_owned + slots.size
    place = jnp.where((ids >= 0) & (ids < num_owned), ids, nowhere)
    in_slot = num_owned + jnp.arange(slots.size, dtype=place.dtype)
    return place.at[slots].set(in_slot, mode="drop")


def by_destination(by_expert: Slots, sent: Int[Array, "E P"]) -> Slots:
    """The same rows by destination, then by expert; `sent` says how many of which go where."""
    rows = _positions_by_destination(by_expert, sent)
    return _in_order(by_expert, rows, jnp.sum(by_expert.group_sizes))


def journey(
    slots: Slots,
    split: Int[Array, "P E P"],
    places: Int[Array, "E"],
    me: Array,
    *,
    num_rows: int,
    nth: Array | int | None = None,
) -> Journey:
    """The whole exchange, or the n-th round of one in rounds of `num_rows` arrivals.

    Args:
      slots: from `by_destination`.
      split: rows of source s and expert e that go to device d.
      places: from `local_experts`.
      me: this device.
      num_rows: R, the room for arrivals.
      nth: which round; None for one that has room for all.
    """
    sizes = split.sum(axis=1)
    first = 0
    if nth is not None:
        first = nth * num_rows
        before = jnp.cumsum(sizes, axis=0) - sizes  # arrivals from earlier sources
        skip = jnp.clip(first - before, 0, sizes)
        sizes_now = jnp.clip(first + num_rows - before, 0, sizes) - skip
        starts = jnp.cumsum(sizes[me]) - sizes[me] + skip[me]
        rows, used = _concatenated_ranges(starts, sizes_now[me], slots.order.size)
        slots, sizes = _in_order(slots, rows, used), sizes_now
    ends = jnp.cumsum(split[:, :, me].reshape(-1))  # of arrivals, by source, then by expert
    row = first + jnp.arange(num_rows, dtype=jnp.int32)
    run = jnp.searchsorted(ends, row, side="right")
    nowhere = jnp.iinfo(jnp.int32).max
    local = jnp.where(run < ends.size, places[run % places.size], nowhere)
    return Journey(slots, sizes, local.astype(jnp.int32))


def there_and_back(
    compute: Callable[..., Array],
    x: Float[Array, "T D"],
    gate: Float[Array, "T K"],
    weights: Any,
    trip: Journey,
    *,
    backend: str | None,
) -> Float[Array, "T D"]:
    """Sends rows and their gates, computes what arrives, returns it, and sums it by token."""
    rows = (rows_of_tokens(x, trip.slots), trip.slots.to_rows(gate))
    rows, scores = exchange(
        rows, trip.sizes, axis="expert", num_rows=trip.local.size, backend=backend
    )
    y = compute(rows, trip.local[:, None], scores[:, None], weights)
    num_sent = trip.slots.order.size
    y = exchange(y, trip.sizes.T, axis="expert", num_rows=num_sent, backend=backend)
    return tokens_of_rows(y, trip.slots, x.dtype)


def not_computed(
    by_expert: Slots, arrived: Int[Array, "P E"], places: Int[Array, "E"], *, num_places: int, room
) -> Int[Array, ""]:
    """A device's choices less the rows it computes: summed over devices, the choices dropped.

    Args:
      by_expert: the device's choices.
      arrived: rows from each source for each expert.
      places: from `local_experts`; `num_places` experts are there.
      room: rows that the device can compute.
    """
    served = jnp.where(places < num_places, arrived.sum(axis=0), 0).sum()
    return jnp.sum(by_expert.group_sizes) - jnp.minimum(served, room)


def _positions_by_destination(by_expert: Slots, sent: Int[Array, "E P"]) -> Int[Array, "A"]:
    first_of_expert = jnp.cumsum(by_expert.group_sizes) - by_expert.group_sizes
    first = first_of_expert[:, None] + jnp.cumsum(sent, axis=1) - sent  # [E, P]
    rows, _ = _concatenated_ranges(first.T.reshape(-1), sent.T.reshape(-1), by_expert.order.size)
    return rows


def _concatenated_ranges(
    starts: Int[Array, "N"], lengths: Int[Array, "N"], size: int
) -> tuple[Int[Array, "size"], Array]:
    """(starts[0], starts[0] + 1, ..., then from starts[1], ...; their number); 0 behind them."""
    ends = jnp.cumsum(lengths)
    index = jnp.arange(size, dtype=jnp.int32)
    run = jnp.minimum(jnp.searchsorted(ends, index, side="right"), starts.size - 1)
    rows = starts[run] + index - (ends - lengths)[run]
    return jnp.where(index < ends[-1], rows, 0), ends[-1]


def _in_order(slots: Slots, rows: Int[Array, "A"], used: Array) -> Slots:
    """The slots of `rows`, of which the first `used` count; all other slots are empty."""
    size = slots.order.size
    index = jnp.arange(size, dtype=jnp.int32)
    order = slots.order[rows]
    # A slot that is not among them gets the last row, which is then not one of the used.
    place = jnp.full((size,), size - 1, jnp.int32)
    place = place.at[jnp.where(index < used, order, size)].set(index, mode="drop")
    return Slots(order, place.reshape(slots.row.shape), used.reshape(1).astype(jnp.int32))
