"""The definition of block attention: masks over every query and key, differentiated by JAX.

Its memory grows with S M per head.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array

from moejax.types import at_least_f32


def moba_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    block_size: int,
    top_k: int,
    segment_ids: Array | None = None,
    q_offset: Array | int = 0,
    scale: float | None = None,
    heads: str = "query",
) -> Array:
    """As `block_attention.moba_attention`, in at least float32."""
    num_rows, num_queries, num_heads, width = q.shape
    num_keys, num_kv = k.shape[1:3]
    wide = at_least_f32(jnp.result_type(q, k, v))
    if segment_ids is None:
        segment_ids = jnp.ones((num_rows, num_keys), jnp.int32)
    real = segment_ids != 0
    k, v = (jnp.where(real[:, :, None, None], x, 0) for x in (k, v))
    at_query = jnp.asarray(q_offset) + jnp.arange(num_queries)
    asked = real[:, at_query, None, None]
    q = jnp.where(asked, q, 0)

    # The block of a key is named by its first key.
    position = jnp.arange(num_keys)
    start = jnp.argmax(segment_ids[:, None, :] == segment_ids[:, :, None], axis=2)
    block = start + (position - start) // block_size * block_size
    member = (block[:, None, :] == position[:, None]) & real[:, None, :]  # [B, block, key]
    size = jnp.maximum(jnp.sum(member, axis=2), 1)
    mean = jnp.einsum("bnm,bmhd->bnhd", member.astype(wide), k.astype(wide), precision="highest")
    mean = (mean / size[..., None, None]).astype(k.dtype).astype(wide)

    groups = q.astype(wide).reshape(num_rows, num_queries, num_kv, -1, width)
    score = jnp.einsum("bshgd,bnhd->bhgsn", groups, mean, precision="highest")
    if heads == "group":
        score = jnp.broadcast_to(jnp.sum(score, axis=2, keepdims=True), score.shape)
    own, own_start = block[:, at_query], start[:, at_query]
    past = position < own[..., None]  # [B, S, block]
    may = past & (position >= own_start[..., None]) & (block == position)[:, None, :]
    may = (may & real[:, None, :])[:, None, None]
    best = jnp.argsort(jnp.where(may, -score, jnp.inf), axis=-1, stable=True)[..., : top_k - 1]
    chosen = jnp.any(best[..., None] == position, axis=-2) & may  # [B, Hkv, G, S, block]

    by_key = jnp.take_along_axis(chosen, block[:, None, None, None, :], axis=-1)
    in_own = (own[..., None] == block[:, None, :]) & (position <= at_query[:, None])
    allowed = (by_key | in_own[:, None, None]) & real[:, None, None, None, :]
    allowed &= real[:, at_query][:, None, None, :, None]
    allowed = jax.lax.stop_gradient(allowed)

    logits = jnp.einsum("bshgd,bmhd->bhgsm", groups, k.astype(wide))
    logits = logits * (1 / math.sqrt(width) if scale is None else scale)
    some = jnp.any(allowed, axis=-1, keepdims=True)
    weight = jax.nn.softmax(jnp.where(allowed, logits, jnp.where(some, -jnp.inf, 0)), axis=-1)
    weight = jnp.where(allowed, weight, 0)
    out = jnp.einsum("bhgsm,bmhd->bshgd", weight, v.astype(wide))
    out = out.reshape(num_rows, num_queries, num_heads, -1)
    return jnp.where(asked, out, 0)  # selects the cotangent too
