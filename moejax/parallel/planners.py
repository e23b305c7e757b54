"""Plans of expert parallelism: how many rows of each expert each device computes.

A plan is int32 `[E, P]` whose row e sums to the load of expert e. The owner of expert e is device
`e // (E / P)`; rows on other devices need a copy of the expert's weights there. Everything is
integer and breaks ties by the lowest id, so that every device that knows the loads makes the same
plan.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import ArrayLike, Bool, Int

from moejax.kernels import compat
from moejax.kernels.least_loaded import checked_loads, least_loaded_plan


def native(
    loads: Int[ArrayLike, " E"], num_devices: int, capacity: Int[ArrayLike, ""] = 0
) -> Int[Array, "E P"]:
    """Every row on the owner of its expert: plain expert parallelism. The capacity is not used."""
    del capacity
    loads = checked_loads("native", loads, num_devices)
    return jnp.where(is_owner(loads.shape[0], num_devices), loads[:, None], 0)


def least_loaded(
    loads: Int[ArrayLike, " E"],
    num_devices: int,
    capacity: Int[ArrayLike, ""],
    *,
    min_chunk: Int[ArrayLike, ""] = 1,
) -> Int[Array, "E P"]:
    """Only what exceeds the capacity moves, in few chunks: see `kernels.least_loaded_plan`.

    A device may compute foreign experts of many owners, and chunks that are all below `min_chunk`
    may fill one over the capacity.
    """
    return least_loaded_plan(loads, num_devices, capacity=capacity, min_chunk=min_chunk)


def one_owner(
    loads: Int[ArrayLike, " E"], num_devices: int, capacity: Int[ArrayLike, ""]
) -> Int[Array, "E P"]:
    """No device above the capacity, and the foreign experts of a device all from one owner.

    So a device computes at most E/P foreign experts, and an owner sends at most P + E/P - 2 copies.
    A device below the capacity gives nothing away.

    Repeatedly the device with the most rows above the capacity fills the one with the most room,
    which is closed then. The giver may sink below the capacity and be filled by another later; what
    it still lacks in the end returns to it. Then each owner hands its largest experts to the
    largest quotas. (The balanced planner of MoonEP, Moonshot AI, for capacities above the mean.)

    Args:
      loads: rows per expert, none negative, with a sum below 2^31.
      num_devices: P; it divides E.
      capacity: rows per device, at least ceil(T / P) for T rows in all; may be traced. With less,
        the room there is is filled, and what is left over stays with its owners.

    Raises:
      ValueError: E is not a multiple of `num_devices`, or `loads` is no vector of integers.
    """
    loads = checked_loads("one_owner", loads, num_devices)
    loads, capacity = compat.vary_alike((loads, jnp.asarray(capacity, jnp.int32)))
    by_owner = loads.reshape(num_devices, -1)
    quotas = _quotas(by_owner.sum(1, dtype=jnp.int32) - capacity)
    moved = _hand_out(by_owner, quotas).reshape(-1, num_devices)
    kept = loads - moved.sum(1, dtype=jnp.int32)
    return moved + jnp.where(is_owner(loads.shape[0], num_devices), kept[:, None], 0)


def is_owner(num_experts: int, num_devices: int) -> Bool[Array, "E P"]:
    """Whether the expert's weights live on the device."""
    owner = jnp.arange(num_experts) // (num_experts // num_devices)
    return owner[:, None] == jnp.arange(num_devices)


class _Fills(NamedTuple):
    """Who fills whom. All `[P]`; the last three are of receivers.

    balance: rows above the capacity, negative where there is room.
    owner: who filled the device, or -1. rows: with how many. step: when, from 0 on.
    """

    balance: Array
    owner: Array
    rows: Array
    step: Array


def _quotas(balance: Array) -> Array:
    """How many rows each owner gives to each receiver, `[owner, receiver]`."""
    fills = _take_back(_fill(balance))
    devices = jnp.arange(balance.shape[0])
    return jnp.where(devices[:, None] == fills.owner, fills.rows, 0)


def _fill(balance: Array) -> _Fills:
    """Until no device is above the capacity, or none has room."""
    devices = jnp.arange(balance.shape[0], dtype=jnp.int32)
    zero = compat.zeros(balance.shape, jnp.int32, like=balance)

    def fill_one(carry: tuple[_Fills, Array]) -> tuple[_Fills, Array]:
        fills, step = carry
        owner = jnp.argmax(fills.balance).astype(jnp.int32)
        receiver = devices == jnp.argmin(fills.balance)
        room = -fills.balance.min()
        less = jnp.where(devices == owner, fills.balance - room, fills.balance)
        fills = _Fills(
            balance=jnp.where(receiver, 0, less),
            owner=jnp.where(receiver, owner, fills.owner),
            rows=jnp.where(receiver, room, fills.rows),
            step=jnp.where(receiver, step, fills.step),
        )
        return fills, step + 1

    goes_on = lambda carry: (carry[0].balance.max() > 0) & (carry[0].balance.min() < 0)
    start = _Fills(balance, owner=zero - 1, rows=zero, step=zero - 1)
    return lax.while_loop(goes_on, fill_one, (start, zero[0]))[0]


def _take_back(fills: _Fills) -> _Fills:
    """From the last fill to the first: what an owner below the capacity gave too much."""
    devices = jnp.arange(fills.balance.shape[0], dtype=jnp.int32)

    def take_back_one(carry: tuple[_Fills, Array]) -> tuple[_Fills, Array]:
        fills, step = carry
        receiver = fills.step == step
        owner = devices == jnp.where(receiver, fills.owner, 0).max()
        lack = -jnp.where(owner, fills.balance, 0).sum(dtype=jnp.int32)
        back = jnp.clip(lack, 0, jnp.where(receiver, fills.rows, 0).max())
        change = jnp.where(owner, back, jnp.where(receiver, -back, 0))
        rows = jnp.where(receiver, fills.rows - back, fills.rows)
        return fills._replace(balance=fills.balance + change, rows=rows), step - 1

    last = fills.step.max()
    return lax.while_loop(lambda carry: carry[1] >= 0, take_back_one, (fills, last))[0]


def _hand_out(by_owner: Array, quotas: Array) -> Array:
    """Rows that each receiver gets of each expert, `[owner, E/P, receiver]`.

    For all owners at once: the largest expert left to the largest quota left. Each trip uses up one
    or the other, and the quotas of an owner are less than its rows.
    """
    num_devices, per_device = by_owner.shape
    receivers, experts = jnp.arange(num_devices), jnp.arange(per_device)

    def hand_out_one(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        left, quotas, moved = state
        receiver = receivers == jnp.argmax(quotas, axis=1)[:, None]  # [owner, receiver]
        expert = experts == jnp.argmax(left, axis=1)[:, None]  # [owner, E/P]
        rows = jnp.minimum(left.max(axis=1), quotas.max(axis=1))[:, None]
        both = expert[:, :, None] & receiver[:, None, :]
        return (
            left - jnp.where(expert, rows, 0),
            quotas - jnp.where(receiver, rows, 0),
            moved + jnp.where(both, rows[:, :, None], 0),
        )

    shape = (num_devices, per_device, num_devices)
    start = by_owner, quotas, compat.zeros(shape, jnp.int32, like=by_owner)
    return lax.while_loop(lambda s: (s[1] > 0).any(), hand_out_one, start)[2]
