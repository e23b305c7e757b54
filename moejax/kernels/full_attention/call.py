"""What one call of full attention asks for, besides queries, keys and values."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax


class Call(NamedTuple):
    """Options of `full_attention`, complete and checked.

    Attributes:
      segment_ids: of the keys, `[B, M]`, or None.
      sinks: logits `[H]`, or None.
      window: how many positions a query sees, its own among them; None for all.
      soft_cap: bound of the logits, or None.
      scale: of the logits.
      q_offset: the first query's position: an int, or an array that is traced.
    """

    segment_ids: Any
    sinks: Any
    window: int | None
    soft_cap: float | None
    scale: float
    q_offset: Any

    @property
    def static_offset(self) -> int | None:
        """The first query's position where it is known before the program runs."""
        return self.q_offset if isinstance(self.q_offset, int) else None

    def query_segments(self, length: int) -> Array:
        """Segment ids `[B, S]` of `length` queries; only where there are any."""
        return lax.dynamic_slice_in_dim(self.segment_ids, self.q_offset, length, axis=1)


def in_reach(query: Array, key: Array, window: int | None) -> Array:
    """`[S, M]`: whether the query's position reaches the key's, going by positions alone."""
    distance = query[:, None] - key[None, :]
    reach = distance >= 0
    return reach if window is None else reach & (distance < window)


def same_segment(query: Array | None, key: Array | None) -> Array | bool:
    """`[B, S, M]` from `[B, S]` and `[B, M]`; True without segments."""
    return True if query is None else query[:, :, None] == key[:, None, :]


def read_rows(call: Call, batch: int, length: int, num_keys: int) -> tuple[Array, Array] | None:
    """Which queries `[B, S]` have an answer, and which keys `[B, M]` any query may look at.

    None where all do. Padding has neither; keys behind the last query, and before the first one's
    window, are looked at by nobody.
    """
    queries = jnp.ones((batch, length), bool)
    keys = jnp.ones((batch, num_keys), bool)
    if call.segment_ids is not None:
        queries, keys = call.query_segments(length) != 0, call.segment_ids != 0
    elif call.static_offset == 0 and length == num_keys:
        return None
    if not (call.static_offset == 0 and length == num_keys):
        position = jnp.arange(num_keys)
        keys &= position < call.q_offset + length
        if call.window is not None:
            keys &= position > call.q_offset - call.window
    return queries, keys
