"""Other ways to balance devices, for comparison: wrapping rows around, and replicating experts."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array

from moejax.parallel import planners


def wrap_around(loads: Array, num_devices: int, capacity: Array) -> Array:
    """A plan without loops: rows above the capacity, in line, fill the room there is, in line.

    An owner gives its largest experts first. No device exceeds the capacity (at least the mean);
    nothing bounds the number of foreign experts, and chunks may be of any size.
    """
    by_owner = loads.reshape(num_devices, -1)
    native = by_owner.sum(1)
    order = jnp.argsort(-by_owner, axis=1, stable=True)
    largest_first = jnp.take_along_axis(by_owner, order, 1)
    before = jnp.cumsum(largest_first, axis=1) - largest_first
    excess = jnp.maximum(native - capacity, 0)[:, None]
    given = jnp.clip(excess - before, 0, largest_first).reshape(-1)
    room = jnp.maximum(capacity - native, 0)
    given_ends, room_ends = jnp.cumsum(given)[:, None], jnp.cumsum(room)
    starts = jnp.maximum(given_ends - given[:, None], room_ends - room)
    moved = jnp.maximum(jnp.minimum(given_ends, room_ends) - starts, 0)
    experts = (order + jnp.arange(num_devices)[:, None] * by_owner.shape[1]).reshape(-1)
    moved = jnp.zeros_like(moved).at[experts].set(moved)
    owner = planners.is_owner(loads.shape[0], num_devices)
    return moved + jnp.where(owner, (loads - moved.sum(1))[:, None], 0)


def replicated(believed: np.ndarray, num_devices: int, spare_slots: int) -> np.ndarray:
    """Replicas of expert e on device p, `[E, P]`, for loads that are believed to come.

    In the manner of EPLB (deepseek-ai/EPLB), without its grouping by nodes: spare slots go one by
    one to the expert with the most rows per replica; then, by decreasing rows, every replica goes
    to the device with the fewest rows that has a slot left. Experts have no owner.
    """
    num_experts = len(believed)
    copies = np.ones(num_experts, np.int64)
    for _ in range(num_devices * spare_slots):
        copies[np.argmax(believed / copies)] += 1
    expert = np.repeat(np.arange(num_experts), copies)
    rows = (believed / copies)[expert]
    free = np.full(num_devices, len(expert) // num_devices)
    load = np.zeros(num_devices)
    placed = np.zeros((num_experts, num_devices), np.int64)
    for replica in np.argsort(-rows, kind="stable"):
        device = np.argmin(np.where(free > 0, load, np.inf))
        placed[expert[replica], device] += 1
        load[device] += rows[replica]
        free[device] -= 1
    return placed


def split_evenly(loads: np.ndarray, replicas: np.ndarray) -> np.ndarray:
    """The plan `[E, P]` that gives every replica of an expert the same share of its rows."""
    ends = np.cumsum(replicas, axis=1)
    up_to = loads[:, None] * ends // ends[:, -1:]
    return np.diff(up_to, axis=1, prepend=0)
