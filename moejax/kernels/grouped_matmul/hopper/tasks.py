"""Which rows each step of the persistent kernel multiplies, and with which group's matrix.

A tile starts at a multiple of `ALIGNMENT` rows, because the copy engine moves whole swizzle atoms,
so a group's first tile may also hold rows of the group before it: only those it owns are stored.
(Rounding starts to an atom instead of a tile is tokamax's idea.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Int

from moejax.kernels.grouped_matmul.groups import LocalGroups
from moejax.kernels.tiles import group_bounds

ALIGNMENT = 8
_PANEL = 16  # tiles that go through all columns together: about square in bytes, for the L2 cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tasks:
    """Tiles of rows: those of the groups in the order of their rows, then those of nobody.

    `V` is a static bound; entries from `counts[1]` on mean nothing.

    Attributes:
      group: the group; 0 for rows of nobody.
      row: the tile's first row, a multiple of `ALIGNMENT`.
      start, stop: the rows `[start, stop)` that the tile stores, within its height.
      counts: how many tiles are of groups, and how many there are.
    """

    group: Int[Array, " V"] | Any
    row: Int[Array, " V"] | Any
    start: Int[Array, " V"] | Any
    stop: Int[Array, " V"] | Any
    counts: Int[Array, " 2"] | Any


def plan(groups: LocalGroups, num_rows: int, height: int) -> Tasks:
    """Tiles of at most `height` rows that store every one of `num_rows` rows exactly once."""
    num_groups = groups.sizes.shape[0]
    starts, stops = group_bounds(groups.sizes, num_rows, groups.first_row)
    # Of nobody: the rows before the first group, and those behind the last.
    starts = jnp.concatenate([starts, jnp.zeros(1, jnp.int32), stops[-1:]])
    stops = jnp.concatenate([stops, starts[:1], jnp.full(1, num_rows, jnp.int32)])
    first = starts // ALIGNMENT * ALIGNMENT
    count = jnp.where(stops > starts, -(-(stops - first) // height), 0)
    ends = jnp.cumsum(count)

    runs = num_groups + 2
    most = (num_rows + (ALIGNMENT - 1) * runs) // height + runs
    tile = jnp.arange(most, dtype=jnp.int32)
    run = jnp.minimum(jnp.searchsorted(ends, tile, side="right"), runs - 1)
    row = first[run] + (tile - (ends - count)[run]) * height
    as_int32 = lambda x: x.astype(jnp.int32)
    return Tasks(
        group=as_int32(jnp.where(run < num_groups, run, 0)),
        row=as_int32(row),
        start=as_int32(jnp.maximum(starts[run], row)),
        stop=as_int32(jnp.minimum(stops[run], row + height)),
        counts=as_int32(jnp.stack([ends[num_groups - 1], ends[-1]])),
    )


@dataclasses.dataclass(frozen=True)
class Order:
    """Deals (tile, block of columns) tasks out to the multiprocessors.

    A panel of tiles goes column by column, so that what runs at the same time shares both the rows
    and the weights in the L2 cache.
    """

    columns: int
    num_multiprocessors: int

    def count(self, first: Array | int, last: Array) -> Array:
        """How many tasks of tiles `[first, last)` are this multiprocessor's."""
        many = jnp.int32(self.num_multiprocessors)
        return lax.div((last - first) * self.columns - lax.axis_index("sm") + many - 1, many)

    def loop(self, first: Array | int, last: Array) -> Callable[[Callable[..., None]], None]:
        """Runs `body(nth, tile, column)` for them; `nth` counts from 0."""

        def run(body):
            @pl.loop(0, self.count(first, last))
            def _(nth):
                at = lax.axis_index("sm") + nth * self.num_multiprocessors
                tile, column = self._pair(at, last - first)
                body(nth, first + tile, column)

        return run

    def _pair(self, at: Array, tiles: Array) -> tuple[Array, Array]:
        panel = lax.div(at, jnp.int32(_PANEL * self.columns))
        above = panel * _PANEL
        height = jnp.minimum(tiles - above, _PANEL)
        within = at - above * self.columns
        column = lax.div(within, height)
        return above + within - column * height, column
