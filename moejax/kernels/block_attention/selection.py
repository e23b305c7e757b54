"""Which blocks a query attends besides its own: those whose mean key it agrees with most.

MoBA (Lu et al., arXiv 2502.13189, section 2). The mean is rounded to the keys' dtype, as in the
authors' code, and multiplied with the query in at least float32. Only indices leave this file:
there is no gate weight and no gradient.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from moejax.kernels.block_attention.blocks import Blocks
from moejax.types import at_least_f32

Heads = Literal["query", "group"]

_SCORES = 1 << 22  # that exist at a time


def select(
    q: Float[Array, "B Hkv G S d"],
    k: Float[Array, "B Hkv M d"],
    blocks: Blocks,
    *,
    num_choices: int,
    heads: Heads = "query",
) -> Int[Array, "B Hkv Gs S K"]:
    """The `num_choices` best targets of every query; J where it may choose fewer.

    Of equal scores the earlier block is taken. With `heads="group"` the query heads that share a
    key choose together, by the sum of their scores, and Gs is 1.

    Args:
      q, k: what attention gets, after rotation.
      blocks: of the keys, by row.
      num_choices: K, from 1 to J.
      heads: who chooses.
    """
    q, k = lax.stop_gradient((q, k))
    wide = at_least_f32(jnp.result_type(q, k))
    if heads == "group":
        q = jnp.sum(q, axis=2, keepdims=True, dtype=wide)
    mean = centroids(k, blocks).astype(wide)
    num_rows, num_kv, group, num_queries, _ = q.shape
    num_targets = blocks.num_targets
    chunk = max(1, min(num_queries, _SCORES // (num_rows * num_kv * group * num_targets)))
    index = jnp.arange(num_targets, dtype=jnp.int32)

    def choose(part: tuple[Array, Array, Array]) -> Array:
        q, first, end = part  # [B, Hkv, G, C, d], [B, C], [B, C]
        # Whatever `jax_default_matmul_precision`: on TPU it would be that of bfloat16.
        score = jnp.einsum("bhgcd,bhjd->bhgcj", q.astype(wide), mean, precision="highest")
        may = (index >= first[..., None]) & (index < end[..., None])
        score = jnp.where(may[:, None, None], score, -jnp.inf)
        best, target = lax.top_k(score, num_choices)
        return jnp.where(best > -jnp.inf, target, num_targets)

    parts = q, blocks.first_target, blocks.end_target
    chosen = lax.map(choose, tuple(_chunks(x, chunk) for x in parts))
    chosen = jnp.moveaxis(chosen, 0, 3).reshape(*q.shape[:3], -1, num_choices)
    return chosen[..., :num_queries, :]


def centroids(k: Float[Array, "B Hkv M d"], blocks: Blocks) -> Float[Array, "B Hkv J d"]:
    """The mean key of every target, in the dtype of the keys; anything finite for no target."""

    def of_row(k: Array, row: Blocks) -> Array:
        return jax.vmap(row.of_keys)(k).mean(axis=2, dtype=at_least_f32(k.dtype))

    return jax.vmap(of_row)(k, blocks).astype(k.dtype)


def _chunks(x: Array, size: int) -> Array:
    """`[..., S, d]` or `[B, S]` as `[chunks, ..., size(, d)]`, filled up with zeros."""
    axis = 3 if x.ndim == 5 else 1
    fill = -x.shape[axis] % size
    x = jnp.pad(x, [(0, fill if i == axis else 0) for i in range(x.ndim)])
    x = x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)
