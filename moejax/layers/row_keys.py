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
    return numbered_keys(key, jnp.arange(num_rows))


def numbered_keys(key: Array, numbers: Int[Array, " B"]) -> Array:
    """Keys `[B]`, the b-th from `key` and the number of row b."""
    return jax.vmap(lambda number: jax.random.fold_in(key, number))(numbers)


def fold_in(keys: Array, data: Int[Array, ""] | int) -> Array:
    """Each of the keys `[B]` with `data` folded in."""
    return jax.vmap(lambda key: jax.random.fold_in(key, data))(keys)
