"""Which rows go from where to where: ranges at both ends, from the matrix of sizes alone.

All of it is integers that every device has, so each works out its part without asking another.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Traffic:
    """One range of rows per pair of devices, `[source, target]`.

    Attributes:
      sizes: the rows that travel.
      send_starts: where they begin among the rows of the source.
      recv_starts: where they begin among the rows of the target.
    """

    sizes: Int[Array, "P P"]
    send_starts: Int[Array, "P P"]
    recv_starts: Int[Array, "P P"]

    def back(self) -> Traffic:
        """The same rows on their way back."""
        return Traffic(self.sizes.T, self.recv_starts.T, self.send_starts.T)


@dataclasses.dataclass(frozen=True)
class Arrivals:
    """For each of the R rows of one device: what arrives there.

    Attributes:
      source: the device that it comes from.
      nth: its place within that device's range.
      sent_from: its place among all of that device's rows.
      is_filled: whether anything arrives; else the other three mean nothing.
    """

    source: Int[Array, " R"]
    nth: Int[Array, " R"]
    sent_from: Int[Array, " R"]
    is_filled: Bool[Array, " R"]

    def or_zero(self, rows: Array) -> Array:
        """`rows` `[R, ...]` with zeros where nothing arrives, whatever lies there."""
        is_filled = self.is_filled.reshape(-1, *(1,) * (rows.ndim - 1))
        return jnp.where(is_filled, rows, jnp.zeros((), rows.dtype))


def fit(sizes: Int[Array, "P P"], *, num_held: int, num_rows: int) -> Traffic:
    """The traffic of `sizes`, cut to the rows that a source has and a target has room for.

    Args:
      num_held: A, the rows of every source. What `sizes` claims beyond does not exist.
      num_rows: R, the room of every target. What would arrive beyond is not sent.
    """
    sizes = sizes.astype(jnp.int32)
    send_starts = jnp.minimum(before(sizes, axis=1), num_held)
    sizes = jnp.minimum(sizes, num_held - send_starts)
    recv_starts = jnp.minimum(before(sizes, axis=0), num_rows)
    sizes = jnp.minimum(sizes, num_rows - recv_starts)
    return Traffic(sizes, send_starts, recv_starts)


def arrivals(traffic: Traffic, target: Int[Array, ""], num_rows: int) -> Arrivals:
    """What arrives in each of the `num_rows` rows of the device `target`."""
    sizes, send_starts, starts = (
        ranges[:, target] for ranges in (traffic.sizes, traffic.send_starts, traffic.recv_starts)
    )
    row = jnp.arange(num_rows, dtype=jnp.int32)
    nth = row - latest(starts, starts, row)
    return Arrivals(
        source=latest(starts, jnp.arange(starts.size, dtype=jnp.int32), row),
        nth=nth,
        sent_from=nth + latest(starts, send_starts, row),
        is_filled=nth < latest(starts, sizes, row),
    )


def before(sizes: Int[Array, "..."], *, axis: int) -> Int[Array, "..."]:
    """Sums of what comes before, along `axis`: where ranges begin that lie one after another."""
    return jnp.cumsum(sizes, axis) - sizes


def latest(
    starts: Int[Array, "P ..."], values: Int[Array, "P ..."], row: Int[Array, " R"]
) -> Int[Array, "... R"]:
    """For each row the value of the last range that starts at or before it; `starts[0]` is 0.

    A sum over steps: compilers fuse it into one loop, without the look-ups of a binary search,
    which TPUs make one by one.
    """
    steps = jnp.diff(values, axis=0, prepend=0)
    passed = starts[..., None] <= row  # [P, ..., R]
    return jnp.where(passed, steps[..., None], 0).sum(0, dtype=jnp.int32)
