"""Cuts every packed segment into blocks, counted from the segment's own first token.

So a segment packed with others has the blocks that it has alone. A *target* is a block that a later
query of its segment may choose. The last block of a segment is none, so every target is full:
exactly `block_size` keys in a row, and no more than (M - 1) // block_size of them in M keys. That
makes their list static in length, whatever the segments.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import ArrayLike, Bool, Float, Int

OWN_TILE = 256  # queries that meet their own block at a time


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Blocks:
    """The blocks of M keys and what the S queries may choose. J is the most targets there can be.

    Attributes:
      block_of_key: the first key of the block that a key lies in; -1 in padding.
      target_of_key: the target that a key lies in; J where it lies in none.
      first_key: the first key of each target, ascending; M in entries that are none.
      own: the first key of the block that a query lies in; -1 in padding.
      first_target, end_target: a query may choose the targets `[first_target, end_target)`. In
        padding they are J and 0.
      offset: the position of the first query.
      block_size: keys in a block.
      tile: queries that meet their own block at a time.
      reach: keys before the first query of such a tile that may lie in a block of its queries.
      regular: target j begins at key j * block_size.
    """

    block_of_key: Int[Array, "*rows M"]
    target_of_key: Int[Array, "*rows M"]
    first_key: Int[Array, "*rows J"]
    own: Int[Array, "*rows S"]
    first_target: Int[Array, "*rows S"]
    end_target: Int[Array, "*rows S"]
    offset: Int[Array, "*rows"]
    block_size: int = dataclasses.field(metadata={"static": True})
    tile: int = dataclasses.field(metadata={"static": True})
    reach: int = dataclasses.field(metadata={"static": True})
    regular: bool = dataclasses.field(metadata={"static": True})

    @property
    def num_targets(self) -> int:
        """J."""
        return self.first_key.shape[-1]

    def every_target(self) -> Int[Array, "*rows S J"]:
        """All that each query may choose, as choices."""
        target = jnp.arange(self.num_targets, dtype=jnp.int32)
        may = (target >= self.first_target[..., None]) & (target < self.end_target[..., None])
        return jnp.where(may, target, self.num_targets)

    def of_keys(self, x: Float[Array, "M w"]) -> Float[Array, "J b w"]:
        """The keys of every target, for one row; some keys in entries that are no target."""
        size, width = self.block_size, x.shape[-1]
        if self.regular:
            return x[: self.num_targets * size].reshape(-1, size, width)
        last = x.shape[0] - size
        index = jnp.minimum(self.first_key, last)[:, None] + jnp.arange(size, dtype=jnp.int32)
        return x.at[index].get(mode="promise_in_bounds")

    def to_keys(self, blocks: Float[Array, "J b w"]) -> Float[Array, "M w"]:
        """What `of_keys` took, in its place; 0 for keys in no target. A gather."""
        num_keys, flat = self.block_of_key.shape[-1], blocks.reshape(-1, blocks.shape[-1])
        if self.regular:
            return jnp.pad(flat, ((0, num_keys - flat.shape[0]), (0, 0)))
        inside = self.target_of_key < self.num_targets
        nth = jnp.arange(num_keys, dtype=jnp.int32) - self.block_of_key
        index = jnp.where(inside, self.target_of_key * self.block_size + nth, 0)
        return jnp.where(inside[:, None], flat.at[index].get(mode="promise_in_bounds"), 0)


def cut_blocks(
    segment_ids: Int[Array, "B M"] | None,
    q_offset: Int[Array, ""] | int,
    *,
    block_size: int,
    num_rows: int,
    num_keys: int,
    num_queries: int,
) -> Blocks:
    """The blocks of B rows of M keys, for the S queries from position `q_offset` on."""
    position = jnp.broadcast_to(jnp.arange(num_keys, dtype=jnp.int32), (num_rows, num_keys))
    if segment_ids is None:
        real, start, follows = (jnp.ones_like(position, bool), jnp.zeros_like(position), None)
    else:
        real = segment_ids != 0
        starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
        start = lax.cummax(jnp.where(starts, position, 0), axis=1)
        # Whether the key block_size further on is of the same segment.
        later = jnp.pad(segment_ids[:, block_size:], ((0, 0), (0, min(block_size, num_keys))))
        follows = real & (later == segment_ids)
    nth = position - start
    block = jnp.where(real, start + nth // block_size * block_size, -1)
    if follows is None:
        follows = position + block_size < num_keys
    is_target = follows & (block == position)

    num_targets = (num_keys - 1) // block_size
    first_key = jnp.sort(jnp.where(is_target, position, num_keys), axis=1)[:, :num_targets]
    before = jnp.cumsum(is_target, axis=1, dtype=jnp.int32) - is_target  # targets before each key
    at_block = jnp.maximum(block, 0)
    rank = jnp.take_along_axis(before, at_block, axis=1)
    inside = real & jnp.take_along_axis(is_target, at_block, axis=1)
    first = jnp.where(real, jnp.take_along_axis(before, start, axis=1), num_targets)

    offset = jnp.asarray(q_offset, jnp.int32)
    of_queries = lambda x: lax.dynamic_slice_in_dim(x, offset, num_queries, 1)
    tile = min(block_size, num_queries, OWN_TILE)
    return Blocks(
        block_of_key=block,
        target_of_key=jnp.where(inside, rank, num_targets),
        first_key=first_key,
        own=of_queries(block),
        first_target=of_queries(first),
        end_target=of_queries(jnp.where(real, rank, 0)),
        offset=jnp.broadcast_to(offset, (num_rows,)),
        block_size=block_size,
        tile=tile,
        reach=_reach(segment_ids is None, q_offset, num_queries, block_size, tile),
        regular=segment_ids is None,
    )


def _reach(regular: bool, q_offset: Array | int, num_queries: int, block_size: int, tile: int):
    """Fewer than a block where it is known that blocks begin where tiles do."""
    if not isinstance(q_offset, int) or block_size % tile and num_queries > tile:
        return block_size
    if regular and q_offset % block_size == 0:
        return block_size - tile if num_queries > tile else 0
    return 0 if q_offset == 0 and num_queries <= tile else block_size


def ordered(segment_ids: Int[ArrayLike, "B M"]) -> Bool[ArrayLike, " B"]:
    """Whether a row's ids never decrease, but for padding (0), which is all at the end."""
    now, then = segment_ids[:, :-1], segment_ids[:, 1:]
    fits = ((then == 0) & (now >= 0)) | ((now > 0) & (then >= now))
    return fits.all(axis=1) & (segment_ids[:, 0] >= 0)
