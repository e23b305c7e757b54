"""Dropout whose draws belong to the sequence, not to the batch or the mesh."""

from __future__ import annotations

import zlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.layers.row_keys import fold_in
from moejax.types import Context


def dropout(
    x: Float[Array, "B S D"], rate: float, context: Context, path: tuple[str, ...]
) -> Float[Array, "B S D"]:
    """Zero with chance `rate`, else x / (1 - rate); x itself without a key.

    `path` is the module's, so that each draws its own.
    """
    if rate == 0 or context.key is None:
        return x
    keys = fold_in(context.key, zlib.crc32("/".join(path).encode()))
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys)
    return jnp.where(keep, x / (1 - rate), 0)
