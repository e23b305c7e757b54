"""What the implementations get: arrays by head, the blocks, and the choices."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from moejax.kernels.block_attention.blocks import Blocks, cut_blocks
from moejax.kernels.block_attention.selection import Heads, select


class Operands(NamedTuple):
    """Of one dtype. `targets` is None where every query attends all it may."""

    q: Float[Array, "B Hkv G S d"]
    k: Float[Array, "B Hkv M d"]
    v: Float[Array, "B Hkv M dv"]
    blocks: Blocks
    targets: Int[Array, "B Hkv Gs S K"] | None


def make_operands(
    q: Float[Array, "B S H d"],
    k: Float[Array, "B M Hkv d"],
    v: Float[Array, "B M Hkv dv"],
    segment_ids: Int[Array, "B M"] | None,
    q_offset: Int[Array, ""] | int,
    *,
    block_size: int,
    top_k: int,
    heads: Heads = "query",
) -> Operands:
    """Those of `moba_attention`, with padding selected to zero."""
    (num_rows, num_queries, _, width), (num_keys, num_kv) = q.shape, k.shape[1:3]
    blocks = cut_blocks(
        segment_ids,
        q_offset,
        block_size=block_size,
        num_rows=num_rows,
        num_keys=num_keys,
        num_queries=num_queries,
    )
    if segment_ids is not None:
        keep = lambda x, real: jnp.where(real[:, :, None, None], x, 0)
        q = keep(q, blocks.own >= 0)
        k, v = keep(k, segment_ids != 0), keep(v, segment_ids != 0)
    q = jnp.moveaxis(q.reshape(num_rows, num_queries, num_kv, -1, width), 1, 3)
    k, v = jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)
    targets = None
    if top_k == 1:
        targets = jnp.zeros((num_rows, num_kv, 1, num_queries, 0), jnp.int32)
    elif blocks.num_targets >= top_k:
        targets = select(q, k, blocks, num_choices=top_k - 1, heads=heads)
    dtype = jnp.result_type(q, k, v)
    return Operands(q.astype(dtype), k.astype(dtype), v.astype(dtype), blocks, targets)
