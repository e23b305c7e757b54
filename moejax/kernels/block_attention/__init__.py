"""Block-sparse attention: every query attends its own block and the best few before it.

MoBA (Lu et al., arXiv 2502.13189): keys are experts in blocks, and a parameter-free router sends
each query to the blocks whose mean key it agrees with most.
"""

from __future__ import annotations

import functools
import math
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

from moejax.errors import UserError
from moejax.kernels import compat
from moejax.kernels.block_attention import reference
from moejax.kernels.block_attention.blocks import Blocks, ordered
from moejax.kernels.block_attention.implementations import IMPLEMENTATIONS, Choice, choose, module
from moejax.kernels.block_attention.operands import make_operands
from moejax.kernels.block_attention.selection import Heads

__all__ = ["IMPLEMENTATIONS", "Heads", "moba_attention"]


def moba_attention(
    q: Float[Array, "B S H d"],
    k: Float[Array, "B M Hkv d"],
    v: Float[Array, "B M Hkv dv"],
    *,
    block_size: int,
    top_k: int,
    segment_ids: Int[ArrayLike, "B M"] | None = None,
    q_offset: Int[ArrayLike, ""] = 0,
    scale: float | None = None,
    heads: Heads = "query",
    implementation: str | None = None,
) -> Float[Array, "B S H dv"]:
    """softmax(scale q k^T) v over a query's own block up to itself, and its best blocks before.

    Keys are cut into blocks of `block_size`, counted from the first token of their segment, so that
    a packed segment gives what it gives alone. A query attends its own block causally, and whole
    the top_k - 1 earlier blocks of its segment (all, if there are fewer) with the greatest
    q . (mean of the block's keys); of equal ones the earlier. The mean is rounded to the keys'
    dtype, the product is in at least float32. Choices have no gradient and weigh nothing.
    Where `top_k` blocks hold a whole segment this is full causal attention.

    Differentiates once, in reverse mode, in q, k and v. Works under jit, scan, remat and shard_map.
    No array of S x M exists but in "reference". What padding holds, in q, k, v or the cotangent,
    reaches nothing; everything else must be finite.

    Args:
      q: queries, `H` a multiple of `Hkv`; query head h reads key head h // (H / Hkv).
      k, v: keys and values, after rotation.
      block_size: keys in a block.
      top_k: blocks that a query attends, its own included.
      segment_ids: of the keys; 0 is padding, all at the end, whose queries give 0. Ids may not
        decrease otherwise: an error where they are known, and where they are traced a row of NaN,
        which the guard of the training step refuses.
      q_offset: query i is the token of key q_offset + i, so that a device may hold a part of the
        queries and all keys. May be traced; NaN then where q_offset + S exceeds M.
      scale: 1 / sqrt(d) when None.
      heads: "query": every query head chooses for itself. "group": those that share a key head
        choose together, by the sum of their scores.
      implementation: one of `IMPLEMENTATIONS`, or None: "scan", which computes every pair, where
        the keys are few, and else what `dispatch.choose` picks: "packed", which computes only the
        chosen ones, until another was accepted. "tpu" is "packed" with kernels of its own, in
        float32 and bfloat16 and blocks of whole registers. "reference" is the definition, for
        comparisons.

    Raises:
      UserError: a block size, number of blocks, number of heads, segments or offset that do not
        fit; an unknown implementation, or one that cannot serve.
    """
    sizes = {"block_size": block_size, "top_k": top_k}
    _check(q, k, v, segment_ids, heads, **sizes)
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    if not isinstance(q_offset, jax.core.Tracer):
        q_offset = int(q_offset)
    broken = _broken(segment_ids, q_offset, q.shape[1], k.shape[1])
    segment_ids = None if segment_ids is None else jnp.asarray(segment_ids, jnp.int32)
    if implementation == "reference":
        options = {"segment_ids": segment_ids, "q_offset": q_offset, "scale": scale}
        out = reference.moba_attention(q, k, v, **sizes, **options, heads=heads)
        out = out.astype(jnp.result_type(q, k, v))
    else:
        dtype = jnp.result_type(q, k, v)
        choice = choose(implementation, dtype, num_keys=k.shape[1], **sizes)
        q, k, v, segment_ids, q_offset = _vary_alike(q, k, v, segment_ids, q_offset)
        by_head = make_operands(q, k, v, segment_ids, q_offset, **sizes, heads=heads)
        out = _attention(choice, scale, *by_head)
        out = jnp.moveaxis(out, 3, 1).reshape(*out.shape[:1], out.shape[3], -1, out.shape[-1])
    return out if broken is None else jnp.where(broken[:, None, None, None], jnp.nan, out)


def _vary_alike(q, k, v, segment_ids, q_offset):
    """All of them, but for an offset that is a number."""
    if isinstance(q_offset, int):
        return *compat.vary_alike((q, k, v, segment_ids)), q_offset
    return compat.vary_alike((q, k, v, segment_ids, q_offset))


def _broken(segment_ids, q_offset, num_queries: int, num_keys: int) -> Array | None:
    """Which rows have segments or an offset that do not fit, where only the values say so."""
    found = None
    if isinstance(segment_ids, jax.core.Tracer):
        found = ~ordered(segment_ids)
    elif segment_ids is not None and not (fits := ordered(np.asarray(segment_ids))).all():
        raise UserError(
            f"moba_attention got segment_ids whose row {fits.argmin()} decreases, or goes on after "
            "padding; number the segments of a row from 1 on and put padding, 0, at the end"
        )
    if isinstance(q_offset, jax.core.Tracer):
        outside = (q_offset < 0) | (q_offset > num_keys - num_queries)
        found = outside[None] if found is None else found | outside
    elif not 0 <= q_offset <= num_keys - num_queries:
        raise UserError(
            f"moba_attention got q_offset {q_offset} for {num_queries} queries and {num_keys} "
            "keys; every query must be the token of a key: pass 0 <= q_offset <= M - S"
        )
    return found


def _check(q, k, v, segment_ids, heads, *, block_size: int, top_k: int) -> None:
    for name, value in (("block_size", block_size), ("top_k", top_k)):
        if value < 1:
            raise UserError(f"moba_attention got {name} {value}; it must be at least 1")
    if heads not in get_args(Heads):
        raise UserError(
            f"moba_attention got heads {heads!r}; use one of {', '.join(get_args(Heads))}"
        )
    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    if not q.ndim == k.ndim == v.ndim == 4 or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"moba_attention needs q [B, S, H, d] and k, v [B, M, Hkv, d]; got {shapes}"
        )
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0]:
        raise ValueError(f"moba_attention needs q, k and v of the same rows and keys; got {shapes}")
    if q.shape[2] % k.shape[2]:
        raise UserError(
            f"moba_attention got {q.shape[2]} query heads for {k.shape[2]} key heads; the number "
            "of query heads must be a multiple of the number of key heads"
        )
    if q.shape[1] > k.shape[1] or 0 in (*q.shape, *v.shape):
        raise UserError(
            f"moba_attention got {shapes}; it needs at least one query, and a key for every query"
        )
    if segment_ids is not None and segment_ids.shape != k.shape[:2]:
        raise ValueError(
            f"moba_attention needs segment_ids of the keys, {k.shape[:2]}; got {segment_ids.shape}"
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(choice: Choice, scale: float, q, k, v, blocks: Blocks, targets):
    return _forward(choice, scale, q, k, v, blocks, targets)[0]


def _forward(choice, scale, q, k, v, blocks, targets):
    plan = module(choice.forward).plan(targets, blocks, q)
    out, lse = module(choice.forward).forward(q, k, v, plan, blocks, scale=scale)
    lse = jnp.where(lse == -jnp.inf, 0, lse)  # of padding, whose cotangent is 0
    out = out.astype(q.dtype)
    if choice.backward != choice.forward:
        plan = module(choice.backward).plan(targets, blocks, q)
    return out, (q, k, v, out, lse, plan, blocks)


def _backward(choice, scale, saved, d_out):
    q, k, v, out, lse, plan, blocks = saved
    if not blocks.regular:  # there is padding
        d_out = jnp.where(blocks.own[:, None, None, :, None] >= 0, d_out, 0)
    backward = module(choice.backward).backward
    gradients = backward(q, k, v, out, lse, d_out.astype(q.dtype), plan, blocks, scale=scale)
    return *gradients, None, None


_attention.defvjp(_forward, _backward)
