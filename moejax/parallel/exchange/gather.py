"""Everyone sees the rows of all and picks: the definition of an exchange, with P times its rows."""

from __future__ import annotations

from jax import Array, lax

from moejax.parallel.exchange.traffic import Traffic, arrivals


def move(rows: list[Array], traffic: Traffic, *, axis: str, num_rows: int) -> list[Array]:
    """What arrives at this device `[num_rows, ...]` of the `rows` `[A, ...]` of all; else zero."""
    coming = arrivals(traffic, lax.axis_index(axis), num_rows)
    index = coming.source * rows[0].shape[0] + coming.sent_from

    def pick(leaf: Array) -> Array:
        everything = lax.all_gather(leaf, axis, tiled=True)  # [P A, ...]
        return coming.or_zero(everything.at[index].get(mode="clip"))

    return [pick(leaf) for leaf in rows]
