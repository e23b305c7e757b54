"""The definition of full attention: every score at once, under a dense mask, differentiated by JAX.

For comparison, and for few positions: it holds `[B, H, S, M]` scores, in at least float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from moejax.kernels.full_attention.call import Call, in_reach, same_segment
from moejax.types import at_least_f32


def obstacle(q: Array, k: Array, v: Array, call: Call) -> str | None:
    """None: it serves every call."""
    del q, k, v, call


def attention(q: Array, k: Array, v: Array, call: Call) -> Array:
    """`[B, S, H, Nv]`; arguments as of the public `full_attention`."""
    (batch, length, heads, _), num_keys, kv_heads = q.shape, k.shape[1], k.shape[2]
    wide = at_least_f32(q.dtype)
    k, v = (jnp.repeat(x.astype(wide), heads // kv_heads, axis=2) for x in (k, v))
    logits = call.scale * jnp.einsum("bshn,bmhn->bhsm", q.astype(wide), k)
    if call.soft_cap is not None:
        logits = call.soft_cap * jnp.tanh(logits / call.soft_cap)
    allowed = in_reach(call.q_offset + jnp.arange(length), jnp.arange(num_keys), call.window)[None]
    if call.segment_ids is not None:
        allowed &= same_segment(call.query_segments(length), call.segment_ids)
    logits = jnp.where(allowed[:, None], logits, -jnp.inf)
    if call.sinks is not None:
        sinks = jnp.broadcast_to(call.sinks.astype(wide)[:, None, None], (batch, heads, length, 1))
        logits = jnp.concatenate([logits, sinks], axis=-1)
    weights = jax.nn.softmax(logits, axis=-1)[..., :num_keys]
    return jnp.einsum("bhsm,bmhn->bshn", weights, v)
