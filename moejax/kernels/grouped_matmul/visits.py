"""Which tile of rows meets which group: the work list of kernels that cut rows on a fixed grid.

A *visit* is one (group, tile) pair that shares rows. A tile on a boundary is visited by every group
in it, one after another. (Gale et al., MegaBlocks, arXiv 2211.15841; JAX's megablox.)
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from moejax.kernels.grouped_matmul.groups import LocalGroups
from moejax.kernels.tiles import group_bounds


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Visits:
    """Visits in the order of their rows. `V` is a static bound; the unused ones repeat the last.

    Attributes:
      group: the group, or G for rows that belong to none.
      tile: the tile of rows.
      start, stop: the group's rows `[start, stop)`, equal where a visit has nothing to add.
    """

    group: Int[Array, " V"]
    tile: Int[Array, " V"]
    start: Int[Array, " V"]
    stop: Int[Array, " V"]


def visits_of_rows(groups: LocalGroups, num_rows: int, height: int) -> Visits:
    """Visits that cover every row exactly once, those of no group included.

    Rows before the first group and behind the last form two more, with the id G.
    """
    num_groups = groups.sizes.shape[0]
    starts, stops = group_bounds(groups.sizes, num_rows, groups.first_row)
    # In front and behind: the rows up to the first group, and those from the last one on.
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), starts, stops[-1:]])
    stops = jnp.concatenate([starts[1:2], stops, jnp.full(1, num_rows, jnp.int32)])
    ids = jnp.asarray([num_groups, *range(num_groups), num_groups])
    return _visits(ids, starts, stops, num_rows, height, empty=0)


def visits_of_groups(groups: LocalGroups, num_rows: int, height: int) -> Visits:
    """Visits of the groups alone, and one without rows for a group that has none."""
    starts, stops = group_bounds(groups.sizes, num_rows, groups.first_row)
    ids = jnp.arange(groups.sizes.shape[0])
    return _visits(ids, starts, stops, num_rows, height, empty=1)


def _visits(
    ids: Array, starts: Array, stops: Array, num_rows: int, height: int, *, empty: int
) -> Visits:
    """Visits of consecutive runs of rows `[start, stop)`; a run without rows gets `empty`."""
    first_tile = jnp.minimum(starts // height, (num_rows - 1) // height)
    tiles = -(-stops // height) - first_tile
    count = jnp.where(stops > starts, tiles, empty)
    ends = jnp.cumsum(count)

    visit = jnp.arange(-(-num_rows // height) + ids.shape[0], dtype=jnp.int32)
    used = visit < ends[-1]
    visit = jnp.minimum(visit, ends[-1] - 1)
    # Compared with every end at once: the search by halves is a loop on TPU.
    run = jnp.searchsorted(ends, visit, side="right", method="compare_all")
    stop = stops[run]
    as_int32 = lambda x: x.astype(jnp.int32)
    return Visits(
        group=as_int32(ids[run]),
        tile=as_int32(first_tile[run] + visit - (ends - count)[run]),
        start=as_int32(jnp.where(used, starts[run], stop)),
        stop=as_int32(stop),
    )
