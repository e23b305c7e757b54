"""Two dense all_to_all: rows of each pair are dealt to all devices, which then deliver them.

A dense all_to_all needs a static number of slots per pair of devices, and one pair may have all
rows. Dealt out in turn (the two phases of routing an h-relation), no pair of a hop has many:

Of the n rows from p to g, row k goes by way of device (p + g + k) mod P, so that device i carries
ceil((n - r) / P) of them with r = (i - p - g) mod P. In the first hop p sends to i the sum of these
over g. There r takes each of 0 ... P-1 once and the n add up to at most A, hence at most
A / P + (P - 1) / 2 rows. In the second hop i sends to g the sum over p: the same with the rows that
g receives. So nothing can overflow, whatever the sizes are.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Int

from moejax.parallel.exchange.traffic import Arrivals, Traffic, arrivals, before, latest


def move(rows: list[Array], traffic: Traffic, *, axis: str, num_rows: int) -> list[Array]:
    """What arrives at this device `[num_rows, ...]` of the `rows` `[A, ...]` of all; else zero."""
    me, num_devices = lax.axis_index(axis), lax.axis_size(axis)
    num_held = rows[0].shape[0]
    hops = _Hops(
        me, num_devices, num_slots(num_held, num_devices), num_slots(num_rows, num_devices)
    )
    coming = arrivals(traffic, me, num_rows)
    dealt, passed_on = hops.deal(traffic), hops.pass_on(traffic)
    found = hops.find(traffic, coming)

    def send(leaf: Array) -> Array:
        for index in (dealt, passed_on):
            leaf = lax.all_to_all(_take(leaf, index), axis, 0, 0, tiled=True)
        return coming.or_zero(_take(leaf, found))

    return [send(leaf) for leaf in rows]


def num_slots(num_rows: int, num_devices: int) -> int:
    """Rows that one device can have for one other, of `num_rows` that it sends or receives."""
    return min(num_rows, (2 * num_rows + num_devices * (num_devices - 1)) // (2 * num_devices))


def _take(rows: Array, index: Array) -> Array:
    """Rows by index. A slot that stays empty has any index: its row is sent and never read."""
    return rows.at[index].get(mode="clip")


@dataclasses.dataclass(frozen=True)
class _Hops:
    """The rows that device `me` puts into the slots of each hop, and finds in the last.

    A hop's buffer has one block of slots per device, packed: in the first hop by final target, in
    the second by first source. Tables below are `[P, P]`.

    Attributes:
      first_slots: slots per pair of devices in the first hop.
      last_slots: slots per pair in the second.
    """

    me: Int[Array, ""]
    num_devices: int
    first_slots: int
    last_slots: int

    def deal(self, traffic: Traffic) -> Int[Array, " slots"]:
        """As a source: which of its rows goes into each slot of the first hop."""
        target, via = self._pairs()
        mine = traffic.sizes[self.me][:, None]
        start = before(self._share(mine, self.me, target, via), axis=0)  # [target, via]
        first = traffic.send_starts[self.me][:, None] + self._turn(self.me, target, via)
        slot = jnp.arange(self.first_slots, dtype=jnp.int32)
        step = self.num_devices
        return (step * slot + latest(start, first - step * start, slot)).reshape(-1)

    def pass_on(self, traffic: Traffic) -> Int[Array, " slots"]:
        """On the way: which row of the first hop goes into each slot of the second."""
        source, target = self._pairs()
        share = self._share(traffic.sizes, source, target, self.me)
        start = before(share, axis=0)  # [source, target]
        first = source * self.first_slots + before(share, axis=1)
        slot = jnp.arange(self.last_slots, dtype=jnp.int32)
        return (slot + latest(start, first - start, slot)).reshape(-1)

    def find(self, traffic: Traffic, coming: Arrivals) -> Int[Array, " R"]:
        """As a target: the slot of the second hop in which each row arrives."""
        source, via = self._pairs()
        mine = traffic.sizes[:, self.me][:, None]
        start = before(self._share(mine, source, self.me, via), axis=0)  # [source, via]
        came_via = (coming.source + self.me + coming.nth) % self.num_devices
        pair = coming.source * self.num_devices + came_via
        start = start.reshape(-1).at[pair].get(mode="promise_in_bounds")
        return came_via * self.last_slots + start + coming.nth // self.num_devices

    def _pairs(self) -> tuple[Array, Array]:
        device = jnp.arange(self.num_devices, dtype=jnp.int32)
        return device[:, None], device

    def _turn(self, source: Array, target: Array, via: Array) -> Array:
        """The first row of a pair that goes this way; every P-th after it does too."""
        return (via - source - target) % self.num_devices

    def _share(self, size: Array, source: Array, target: Array, via: Array) -> Array:
        """How many of a pair's rows go this way."""
        step = self.num_devices
        return (size - self._turn(source, target, via) + step - 1) // step
