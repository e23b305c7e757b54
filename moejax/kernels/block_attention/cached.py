"""Block attention of a few queries over a decoding cache, as `moba_attention` has it for rows."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.kernels.block_attention.blocks import cut_blocks
from moejax.kernels.block_attention.selection import Heads, select
from moejax.kernels.full_attention.softmax import heads_first, heads_last, rows, softmax_attention


def attend_slots(
    q: Float[Array, "B S H d"],
    keys: Float[Array, "B M Hkv d"],
    values: Float[Array, "B M Hkv dv"],
    positions: Int[Array, "B S"],
    *,
    block_size: int,
    top_k: int,
    heads: Heads = "query",
    scale: float | None = None,
) -> Float[Array, "B S H dv"]:
    """What `moba_attention` gives the query at `positions[b, s]` of a sequence of keys.

    Slot m of row b holds the key and value of position m of one sequence; every slot up to a
    query's own is written, and those behind it are finite. Scores of all slots are computed and
    those of other blocks masked: for few queries that costs what reading the cache costs.

    Args:
      q: queries, after rotation. keys, values: of the cache, the queries' own among them.
      positions: the result of one that is M or more has no meaning.
      block_size, top_k, heads, scale: as in `moba_attention`.
    """
    q, keys, values = heads_first(q, keys, values)
    allowed = _allowed(q, keys, positions, block_size=block_size, top_k=top_k, heads=heads)

    def of_head(q: Array, keys: Array, values: Array, allowed: Array) -> Array:
        q, keys, values = q[:, None, None], keys[:, None], values[:, None]
        return softmax_attention(q, keys, values, allowed, scale=scale)[:, 0, 0]

    # `softmax_attention` has one mask for all heads, and here each query of each head has its own.
    out = jax.vmap(of_head, in_axes=1, out_axes=1)(rows(q), keys, values, rows(allowed))
    return heads_last(out.reshape(*q.shape[:-1], -1))


def _allowed(
    q: Float[Array, "B Hkv G S d"],
    keys: Float[Array, "B Hkv M d"],
    positions: Int[Array, "B S"],
    *,
    block_size: int,
    top_k: int,
    heads: Heads,
) -> Bool[Array, "B Hkv G S M"]:
    """Which slots each query attends."""
    num_rows, _, _, num_queries, _ = q.shape
    num_keys = keys.shape[2]
    slot, own = jnp.arange(num_keys), (positions // block_size)[..., None]
    block = slot // block_size
    allowed = ((block == own) & (slot <= positions[..., None]))[:, None, None]
    past = (block < own)[:, None, None]
    blocks = cut_blocks(
        None,
        0,
        block_size=block_size,
        num_rows=num_rows,
        num_keys=num_keys,
        num_queries=num_queries,
    )
    num_targets = blocks.num_targets
    if top_k > num_targets:
        allowed = allowed | past
    elif top_k > 1:
        end = jnp.minimum(own[..., 0], num_targets).astype(jnp.int32)
        blocks = dataclasses.replace(blocks, first_target=jnp.zeros_like(end), end_target=end)
        targets = select(q, keys, blocks, num_choices=top_k - 1, heads=heads)
        # A query with fewer choices has J among them: the last block, which is past to nobody.
        chosen = jnp.any(targets[..., None] == jnp.arange(num_targets + 1), axis=-2)
        allowed = allowed | (chosen[..., block] & past)
    return jnp.broadcast_to(allowed, (*q.shape[:-1], num_keys))
