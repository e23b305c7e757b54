"""Random keys, one for each row of a batch: what is drawn for a sequence is the sequence's own.

So it depends neither on how the batch is split into microbatches or over devices, nor on the other
sequences in it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


def row_keys(key: Array, num_rows: int) -> Array:
    """Keys `[B]`, the b-th from `key` and b."""
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(num_rows))


def fold_in(keys: Array, data: Int[Array, ""] | int) -> Array:
    """Each of the keys `[B]` with `data` folded in."""
    return jax.vmap(lambda key: jax.random.fold_in(key, data))(keys)
