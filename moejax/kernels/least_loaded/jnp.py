"""The least-loaded plan as a loop over the chunks that move, for every platform.

An expert that fits at home changes nothing that a later decision depends on. So a trip of the loop
is one moved chunk, and the next expert that has to give up rows is found by one search over all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from moejax.kernels import compat

_MOST = jnp.iinfo(jnp.int32).max


def obstacle() -> str | None:
    """None: it serves everywhere."""
    return None


class _State(NamedTuple):
    """Between two chunks. `rest` is 0 only when no expert has to give up rows any more.

    held `[P]`: rows of each device, without those still to be placed (`rest`).
    moved `[E, P]`: rows given to devices other than the owner.
    position, expert, rest: the expert at hand, its place in the order, its rows still to be placed.
    """

    held: Array
    moved: Array
    position: Array
    expert: Array
    rest: Array


def plan(loads: Array, capacity: Array, min_chunk: Array, num_devices: int) -> Array:
    """The plan, int32 `[E, P]`, for int32 `loads` `[E]` and scalars; P >= 2 divides E > 0."""
    by_owner = loads.reshape(num_devices, -1)
    per_device = by_owner.shape[1]
    next_expert = _search(loads, capacity, num_devices)
    devices = jnp.arange(num_devices, dtype=jnp.int32)

    def place_chunk(state: _State) -> _State:
        others = jnp.where(devices == state.expert // per_device, _MOST, state.held)
        least = others.min()
        helper = jnp.where(others == least, devices, num_devices).min()
        room = capacity - least
        chunk = jnp.where((room >= state.rest) | (room < min_chunk), state.rest, room)
        return next_expert(
            state._replace(
                held=state.held + jnp.where(devices == helper, chunk, 0),
                moved=_add_at(state.moved, (state.expert, helper), chunk),
                rest=state.rest - chunk,
            )
        )

    zero = compat.zeros((), jnp.int32, like=loads)
    start = _State(
        held=by_owner.sum(1, dtype=jnp.int32),
        moved=compat.zeros((loads.shape[0], num_devices), jnp.int32, like=loads),
        position=zero - 1,
        expert=zero,
        rest=zero,
    )
    moved = lax.while_loop(lambda s: s.rest > 0, place_chunk, next_expert(start)).moved
    owner = jnp.arange(loads.shape[0]) // per_device
    kept = loads - moved.sum(1, dtype=jnp.int32)
    return moved + jnp.where(owner[:, None] == devices, kept[:, None], 0)


def _search(loads: Array, capacity: Array, num_devices: int) -> Callable[[_State], _State]:
    """Moves on to the next expert whose owner holds too much, once nothing is left to place."""
    num_experts, per_device = loads.shape[0], loads.shape[0] // num_devices
    devices = jnp.arange(num_devices, dtype=jnp.int32)
    order = jnp.argsort(-loads, stable=True).astype(jnp.int32)
    place = jnp.argsort(order).astype(jnp.int32)
    place = jnp.where(loads > 0, place, num_experts).reshape(num_devices, per_device)

    def next_expert(state: _State) -> _State:
        waits = (state.held > capacity)[:, None] & (place > state.position)
        found = jnp.where(waits, place, num_experts).min()
        expert = order[jnp.minimum(found, num_experts - 1)]
        owner = expert // per_device
        excess = jnp.minimum(state.held[owner] - capacity, loads[expert])
        rest = jnp.where(found < num_experts, excess, 0)
        done = state.rest == 0
        return _State(
            held=state.held - jnp.where(done & (devices == owner), rest, 0),
            moved=state.moved,
            position=jnp.where(done, found, state.position),
            expert=jnp.where(done, expert, state.expert),
            rest=jnp.where(done, rest, state.rest),
        )

    return next_expert


def _add_at(array: Array, at: tuple[Array, Array], value: Array) -> Array:
    """Adds to one element, in place within a loop (a scatter is a loop of its own on CPU)."""
    old = lax.dynamic_slice(array, at, (1, 1))
    return lax.dynamic_update_slice(array, old + value, at)
