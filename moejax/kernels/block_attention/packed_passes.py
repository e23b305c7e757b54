"""The passes of an implementation that packs queries by block, around its routed tiles.

Choose, sort, attend block by block, combine by log-sum-exp (the algorithm of the MoBA paper). The
backward pass starts from the result over all keys and its log-sum-exp, so no part is kept.

Packed queries meet the blocks that they chose in a function that each implementation has of its
own; `routed_tiles.py` says what such a function gets and gives.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from moejax.kernels.block_attention import own_block
from moejax.kernels.block_attention.blocks import Blocks
from moejax.kernels.block_attention.combine import combine
from moejax.kernels.block_attention.heads import by_head
from moejax.kernels.block_attention.packing import pack
from moejax.kernels.expert_mlp.slots import Slots


def plan(targets: Int[Array, "B Hkv Gs S K"] | None, blocks: Blocks, q: Array) -> Slots | None:
    """The packed queries of every key head; None where there is nothing to choose."""
    group = q.shape[2]
    if targets is None:
        every = blocks.every_target()
        targets = jnp.broadcast_to(every[:, None, None], (*q.shape[:2], 1, *every.shape[1:]))
    if not targets.shape[-1]:
        return None

    def of_head(targets: Array, blocks: Blocks) -> Slots:
        targets = jnp.broadcast_to(targets, (group, *targets.shape[1:]))
        return pack(targets.reshape(-1, targets.shape[-1]), blocks.num_targets)

    return by_head(of_head, targets, blocks)


def forward(
    routed: Callable[..., tuple[Array, Array]],
    q: Float[Array, "B Hkv G S d"],
    k: Float[Array, "B Hkv M d"],
    v: Float[Array, "B Hkv M dv"],
    slots: Slots | None,
    blocks: Blocks,
    *,
    scale: float,
) -> tuple[Float[Array, "B Hkv G S dv"], Float[Array, "B Hkv G S"]]:
    """(result, log-sum-exp), in at least float32; 0 and -inf in padding.

    Args:
      routed: `routed_tiles.forward`, or another like it.
    """

    def of_head(arrays: tuple, blocks: Blocks) -> tuple[Array, Array]:
        q, k, v, slots = arrays
        out, lse = own_block.forward(q, k, v, blocks, scale=scale)
        if slots is None:
            return out, lse
        keys, values = blocks.of_keys(k), blocks.of_keys(v)
        rows = routed(_tokens(q), keys, values, slots, scale=scale)
        total, total_lse = combine(_tokens(out), lse.reshape(-1), *rows, slots)
        return total.reshape(out.shape), total_lse.reshape(lse.shape)

    return by_head(of_head, (q, k, v, slots), blocks)


def backward(
    routed: Callable[..., tuple[Array, Array, Array]],
    q: Float[Array, "B Hkv G S d"],
    k: Float[Array, "B Hkv M d"],
    v: Float[Array, "B Hkv M dv"],
    out: Float[Array, "B Hkv G S dv"],
    lse: Float[Array, "B Hkv G S"],
    d_out: Float[Array, "B Hkv G S dv"],
    slots: Slots | None,
    blocks: Blocks,
    *,
    scale: float,
) -> tuple[Float[Array, "B Hkv G S d"], Float[Array, "B Hkv M d"], Float[Array, "B Hkv M dv"]]:
    """(dq, dk, dv) for the cotangent of the result.

    Args:
      routed: `routed_tiles.backward`, or another like it.
    """

    def of_head(arrays: tuple, blocks: Blocks) -> tuple[Array, ...]:
        q, k, v, out, lse, d_out, slots = arrays
        mean = jnp.sum(d_out.astype(lse.dtype) * out.astype(lse.dtype), axis=-1)
        of_queries = d_out, lse, mean
        d_q, d_k, d_v = own_block.backward(q, k, v, *of_queries, blocks, scale=scale)
        if slots is not None:
            rows, d_keys, d_values = routed(
                _tokens(q),
                blocks.of_keys(k),
                blocks.of_keys(v),
                *map(_tokens, of_queries),
                slots,
                scale=scale,
            )
            d_q = d_q + slots.sum_by_token(rows, d_q.dtype).reshape(d_q.shape)
            d_k, d_v = d_k + blocks.to_keys(d_keys), d_v + blocks.to_keys(d_values)
        return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype)

    return by_head(of_head, (q, k, v, out, lse, d_out, slots), blocks)


def _tokens(x: Array) -> Array:
    """`[G, S, ...]` as one list of G S queries."""
    return x.reshape(-1, *x.shape[2:])
