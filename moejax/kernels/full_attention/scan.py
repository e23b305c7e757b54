"""Full attention in memory linear in the sequence, forward and backward, in plain JAX.

A short row is a few blocks of queries, one after another, each against all keys that it may see
(`softmax.py`). A long one is blocks of queries times blocks of keys, with the softmax built up from
block to block (`blocks.py`). Both skip what causality and the window exclude, and neither ever
holds more scores than one block's.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax import Array

from moejax.kernels.full_attention import blocks
from moejax.kernels.full_attention.call import Call, in_reach, same_segment
from moejax.kernels.full_attention.softmax import heads_first, heads_last, softmax_attention

# On CPU, forward and backward, `softmax.py` takes 0.65 to 0.95 of the time of `blocks.py` at 512
# keys in float32 and 1.15 in bfloat16, and at 768 and 1024 keys 1.15 to 1.5 in either.
SHORT = 512
# Of a short row: four blocks, as long as they have 64 queries. Two take 1.15 times as long at 256.
MOST_BLOCKS, LEAST_QUERIES = 4, 64


def obstacle(q: Array, k: Array, v: Array, call: Call) -> str | None:
    """None: it serves every call."""
    del q, k, v, call


def attention(q: Array, k: Array, v: Array, call: Call) -> Array:
    """`[B, S, H, Nv]`; arguments as of the public `full_attention`."""
    length, num_keys = q.shape[1], k.shape[1]
    if call.static_offset is None or num_keys > SHORT:
        return blocks.attention(q, k, v, call)
    block = max(LEAST_QUERIES, math.ceil(length / MOST_BLOCKS))
    q, k, v = heads_first(q, k, v)
    segments = None if call.segment_ids is None else call.query_segments(length)
    outputs = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        here = slice(call.q_offset + start, call.q_offset + stop)
        first = 0 if call.window is None else max(0, here.start - call.window + 1)
        seen = slice(first, here.stop)
        positions = jnp.arange(here.start, here.stop), jnp.arange(first, here.stop)
        allowed = in_reach(*positions, call.window)[None]
        if segments is not None:
            allowed &= same_segment(segments[:, start:stop], call.segment_ids[:, seen])
        outputs.append(
            softmax_attention(
                q[..., start:stop, :],
                k[:, :, seen],
                v[:, :, seen],
                allowed,
                call.sinks,
                scale=call.scale,
                soft_cap=call.soft_cap,
            )
        )
    return heads_last(jnp.concatenate(outputs, axis=-2))
