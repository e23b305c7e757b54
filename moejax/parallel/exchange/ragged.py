"""One `lax.ragged_all_to_all`: each row travels once. Does not exist on CPU."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from moejax.kernels import compat
from moejax.parallel.exchange.traffic import Traffic


def move(rows: list[Array], traffic: Traffic, *, axis: str, num_rows: int) -> list[Array]:
    """What arrives at this device `[num_rows, ...]` of the `rows` `[A, ...]` of all; else zero."""
    me = lax.axis_index(axis)
    # The third: where this device's rows begin at each of the others.
    send = [ranges[me] for ranges in (traffic.send_starts, traffic.sizes, traffic.recv_starts)]
    arriving = traffic.sizes[:, me]
    # What nothing is written to keeps its zeros. They depend on this exchange's own sizes, or XLA
    # would make them once before a loop over layers, and copy them in each.
    zero, arriving = lax.optimization_barrier((jnp.int32(0), arriving))

    def send_leaf(leaf: Array) -> Array:
        room = jnp.broadcast_to(zero.astype(leaf.dtype), (num_rows, *leaf.shape[1:]))
        room = compat.vary_over(room, tuple(compat.varying_axes(leaf)))
        return lax.ragged_all_to_all(leaf, room, *send, arriving, axis_name=axis)

    return [send_leaf(leaf) for leaf in rows]
