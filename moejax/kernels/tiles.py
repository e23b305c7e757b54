"""Cuts groups of rows into tiles of a few static heights, and loops over the tiles.

XLA needs static shapes and groups have dynamic sizes. Each group becomes tiles of the greatest
height plus one tile of the smallest height that holds the rest; heights lie closest together about
the mean size of a group, where a balanced routing has most of them. One loop per height then runs
over the tiles of that height, so nothing is padded in memory, no branch is taken (XLA's conditional
copies its operands on some versions), and the loops' carries are updated in place.

A tile may be taller than its group's rest, and then overlaps a neighbour. `load` reads the rows of
others as zero and `store` leaves them alone, both by selection, so that a NaN there stays there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Int

Carry = TypeVar("Carry")

# Heights in mean sizes of a group. Balanced groups are within an eighth of it; every height is one
# more loop to compile.
_HEIGHTS = (1 / 4, 1 / 2, 3 / 4, 7 / 8, 1, 9 / 8, 5 / 4, 3 / 2, 2, 3, 4)
_TALL = 512  # rows: a second tile reads the group's weights again, so there are taller ones too
_TALLEST = 1024  # beyond it a tile's rows leave the caches
_SMALLEST_MEAN = 64  # rows: smaller groups wait for their weights from memory, whatever the height
_FEW_ROWS = 2048  # in all: fewer are done before more than a few loops are compiled
_COARSE = (32, 64, 128, 256, 512)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TileList:
    """Tiles ordered by height. `M` is a static bound on their number.

    Attributes:
      group: the group of each tile.
      start: its first row.
      num_rows: its rows, at most its height.
      height_ends: for each height, the end of its tiles in this list.
      heights: the heights.
      total_rows: R, the rows of the arrays that the tiles cut.
    """

    group: Int[Array, " M"]
    start: Int[Array, " M"]
    num_rows: Int[Array, " M"]
    height_ends: Int[Array, " H"]
    heights: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    total_rows: int = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class Tile:
    """`height` consecutive rows from `start`; only those in `inside` belong to `group`."""

    group: Int[Array, ""]
    start: Int[Array, ""]
    inside: Bool[Array, " height"]
    is_first: bool  # no tile of the group came before

    def load(self, source: Array) -> Array:
        """The tile's rows of `source` `[R, ...]`; rows of other groups read as zero."""
        return self.select(self.load_all(source), 0)

    def load_all(self, source: Array) -> Array:
        """As `load`, with rows of other groups as they are: for products that keep rows apart."""
        return lax.dynamic_slice_in_dim(source, self.start, self.inside.size, 0)

    def gather(self, source: Array, index: Int[Array, " R"]) -> Array:
        """`source[index]` for the tile's rows; rows of other groups read as zero."""
        index = lax.dynamic_slice_in_dim(index, self.start, self.inside.size, 0)
        return self.select(source.at[index].get(mode="promise_in_bounds"), 0)

    def store(self, target: Array, rows: Array) -> Array:
        """`target` `[R, ...]` with the tile's rows replaced; rows of other groups stay."""
        old = lax.dynamic_slice_in_dim(target, self.start, self.inside.size, 0)
        rows = self.select(rows.astype(target.dtype), old)
        return lax.dynamic_update_slice_in_dim(target, rows, self.start, 0)

    def add_to_group(self, target: Array, value: Array) -> Array:
        """`target` `[G, ...]`, zero at first, with `value` added to the entry of the group."""
        value = value.astype(target.dtype)
        if not self.is_first:  # else the entry is still zero and need not be read
            value = value + target[self.group]
        return lax.dynamic_update_index_in_dim(target, value, self.group, 0)

    def select(self, rows: Array, other: Array | int) -> Array:
        inside = self.inside.reshape(-1, *(1,) * (rows.ndim - 1))
        return jnp.where(inside, rows, other)


def group_bounds(
    group_sizes: Int[Array, " G"], total_rows: int, first_row: Int[Array, ""] | int = 0
) -> tuple[Int[Array, " G"], Int[Array, " G"]]:
    """First row of every group and the row behind its last, cut at `total_rows`."""
    ends = jnp.minimum(first_row + jnp.cumsum(group_sizes.astype(jnp.int32)), total_rows)
    first = jnp.minimum(jnp.asarray(first_row, jnp.int32), total_rows).reshape(1)
    return jnp.concatenate([first, ends[:-1]]), ends


def tile_heights(total_rows: int, num_groups: int) -> tuple[int, ...]:
    """Ascending heights of tiles for `num_groups` groups of together `total_rows` rows."""
    if total_rows < _FEW_ROWS:
        heights = set(_COARSE)
    else:
        mean = min(max(total_rows / num_groups, _SMALLEST_MEAN), _TALL)
        heights = {min(_round_up(mean * height), _TALLEST) for height in _HEIGHTS}
        heights |= {height for height in (_TALL // 2, _TALL) if height > max(heights)}
    return tuple(h for h in sorted(heights) if h < total_rows) or (total_rows,)


def _round_up(height: float) -> int:
    step = 16 if height > 96 else 32
    return -(-int(height) // step) * step


def plan_tiles(
    group_sizes: Int[Array, " G"], total_rows: int, *, first_row: Int[Array, ""] | int = 0
) -> TileList:
    """Tiles for groups that lie one after another from `first_row` on.

    Args:
      group_sizes: rows per group; zero is allowed.
      total_rows: R > 0. What the sizes claim beyond it does not exist.
      first_row: where the first group starts.
    """
    num_groups = group_sizes.shape[0]
    heights = tile_heights(total_rows, num_groups)
    top = heights[-1]
    starts, ends = group_bounds(group_sizes, total_rows, first_row)
    tiles_per_group = -(-(ends - starts) // top)
    tile_ends = jnp.cumsum(tiles_per_group)

    index = jnp.arange(total_rows // top + num_groups, dtype=jnp.int32)
    group = jnp.searchsorted(tile_ends, index, side="right").astype(jnp.int32)
    used = group < num_groups
    group = jnp.minimum(group, num_groups - 1)
    nth = index - (tile_ends - tiles_per_group)[group]
    start = starts[group] + nth * top
    num_rows = jnp.minimum(ends[group] - start, top)

    # Unused entries go behind all heights and no loop reaches them.
    height = jnp.where(used, jnp.searchsorted(jnp.asarray(heights), num_rows), len(heights))
    order = jnp.argsort(height, stable=True)
    height_ends = jnp.sum(height[:, None] <= jnp.arange(len(heights)), 0, dtype=jnp.int32)
    return TileList(
        group=group[order],
        start=start[order].astype(jnp.int32),
        num_rows=num_rows[order].astype(jnp.int32),
        height_ends=height_ends,
        heights=heights,
        total_rows=total_rows,
    )


def scan_tiles(tiles: TileList, body: Callable[[Tile, Carry], Carry], carry: Carry) -> Carry:
    """Runs `carry = body(tile, carry)` over all tiles, one loop per height, in ascending order.

    So a group's rest comes before its tiles of the greatest height, which are the only several.
    """
    begin = jnp.zeros_like(tiles.height_ends[0])
    for i, height in enumerate(tiles.heights):

        def step(j: Array, carry: Carry, height: int = height) -> Carry:
            first = tiles.start[j]
            # At the end of the array the tile is moved up rather than cut.
            start = jnp.minimum(first, tiles.total_rows - height)
            row = start + jnp.arange(height, dtype=jnp.int32)
            inside = (row >= first) & (row < first + tiles.num_rows[j])
            is_first = height < tiles.heights[-1]
            return body(Tile(tiles.group[j], start, inside, is_first), carry)

        carry = lax.fori_loop(begin, tiles.height_ends[i], step, carry)
        begin = tiles.height_ends[i]
    return carry
