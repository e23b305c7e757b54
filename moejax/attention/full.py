"""Causal softmax attention: grouped queries, RoPE, QK-norm, sliding window, KV cache.

Vaswani et al., arXiv 1706.03762; grouped queries, Ainslie et al., arXiv 2305.13245.
"""

from __future__ import annotations

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.errors import UserError
from moejax.layers.linear import Linear
from moejax.layers.norm import RMSNorm
from moejax.layers.rope import Rope
from moejax.types import Context, at_least_f32


class FullAttention(nn.Module):
    """Attention over every earlier position of the same segment (within `context.window`).

    Attributes:
      num_heads: query heads H.
      num_kv_heads: key and value heads; must divide H.
      head_dim: width N of a head; `D / num_heads` when None.
      rope: rotary embedding, or None for none (NoPE).
      qk_norm: RMSNorm on queries and keys: per head (Qwen3) as given; None for none.
      qk_norm_full: normalise over the full projected width (OLMoE) rather than per head.
      use_bias: biases on the q, k and v projections; `use_output_bias` on the output.
      query_blocks: training computes this many blocks of queries one after another, each against
        only the keys that causality and window let it see. Changes speed, not the result.
      linear: prototype of the four projections; adapters replace it.

    Softmax and its sums are in at least float32. Decoding keeps keys and values in the
    collection `cache`, one slot per position.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int | None = None
    rope: Rope | None = dataclasses.field(default_factory=Rope)
    qk_norm: nn.Module | None = None
    qk_norm_full: bool = False
    use_bias: bool = False
    use_output_bias: bool = False
    query_blocks: int = 1
    linear: nn.Module = dataclasses.field(default_factory=Linear)

    @nn.compact
    def __call__(self, x: Float[Array, "B S D"], context: Context) -> Float[Array, "B S D"]:
        batch, length, d_model = x.shape
        head_dim = self._head_dim(d_model)

        def project(name: str, heads: int) -> Array:
            linear = self.linear.copy(
                features=heads * head_dim, use_bias=self.use_bias, axes=("embed", "heads"), name=name
            )
            y = linear(x, context)
            if self.qk_norm is None or name == "value":
                return y.reshape(batch, length, heads, head_dim)
            norm = self.qk_norm.copy(name=f"{name}_norm")
            if self.qk_norm_full:
                return norm(y).reshape(batch, length, heads, head_dim)
            return norm(y.reshape(batch, length, heads, head_dim))

        q = project("query", self.num_heads)
        k = project("key", self.num_kv_heads)
        v = project("value", self.num_kv_heads)
        if self.rope is not None:
            q, k = self.rope(q, context.positions), self.rope(k, context.positions)
        if context.decode:
            out = self._attend_cache(q, k, v, context)
        else:
            out = attend(q, k, v, context, query_blocks=self.query_blocks)
        output = self.linear.copy(
            features=d_model, use_bias=self.use_output_bias, axes=("heads", "embed"), name="output"
        )
        return output(out.reshape(batch, length, -1), context)

    def _head_dim(self, d_model: int) -> int:
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise UserError(
                f"attention.num_kv_heads={self.num_kv_heads} must divide "
                f"attention.num_heads={self.num_heads}"
            )
        if self.head_dim is not None:
            return self.head_dim
        if d_model % self.num_heads:
            raise UserError(
                f"attention.num_heads={self.num_heads} does not divide model.d_model={d_model}; "
                "change one of them or set attention.head_dim"
            )
        return d_model // self.num_heads

    def _attend_cache(self, q: Array, k: Array, v: Array, context: Context) -> Array:
        """Writes k and v at their positions, then attends to every slot up to the query's own."""
        if context.cache_length is None:
            raise ValueError("decoding needs context.cache_length, the number of cache slots")
        batch, _, heads, head_dim = k.shape
        shape = (batch, context.cache_length, heads, head_dim)
        keys = self.variable("cache", "cached_key", jnp.zeros, shape, k.dtype)
        values = self.variable("cache", "cached_value", jnp.zeros, shape, v.dtype)
        # Padding is sent to a slot that does not exist, and dropped.
        slots = jnp.where(context.token_mask, context.positions, context.cache_length)
        rows = jnp.arange(batch)[:, None]
        keys.value = keys.value.at[rows, slots].set(k, mode="drop")
        values.value = values.value.at[rows, slots].set(v, mode="drop")
        distance = context.positions[:, :, None] - jnp.arange(context.cache_length)  # [B, S, M]
        allowed = distance >= 0
        if context.window is not None:
            allowed &= distance < context.window
        return softmax_attention(q, keys.value, values.value, allowed)


def attend(q: Array, k: Array, v: Array, context: Context, *, query_blocks: int) -> Array:
    """Causal attention within segments. q `[B, S, H, N]`, k and v `[B, S, Hkv, N]`.

    Query block i only meets the keys `[first, last)` that its last query may see and its first
    query's window still reaches, so that skipped blocks cost nothing.
    """
    length = q.shape[1]
    block = math.ceil(length / query_blocks)
    outputs = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        first = 0 if context.window is None else max(0, start - context.window + 1)
        query, key = slice(start, stop), slice(first, stop)
        distance = jnp.arange(start, stop)[:, None] - jnp.arange(first, stop)[None, :]
        allowed = distance >= 0
        if context.window is not None:
            allowed &= distance < context.window
        segments = context.segment_ids
        same = segments[:, query, None] == segments[:, None, key]  # [B, S, S']
        outputs.append(softmax_attention(q[:, query], k[:, key], v[:, key], allowed & same))
    return jnp.concatenate(outputs, axis=1)


def softmax_attention(
    q: Float[Array, "B S H N"],
    k: Float[Array, "B M Hkv N"],
    v: Float[Array, "B M Hkv N"],
    allowed: Array,  # [B, S, M] or [S, M]
) -> Float[Array, "B S H N"]:
    """softmax(q k^T / sqrt(N)) v over the allowed keys; a query with none allowed gives 0."""
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    dtype = at_least_f32(q.dtype)
    q = q.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    logits = jnp.einsum("bsgqn,bmgn->bgqsm", q, k, preferred_element_type=dtype)
    logits = logits * (1.0 / math.sqrt(head_dim))
    allowed = jnp.broadcast_to(allowed, (batch, length, k.shape[1]))[:, None, None]
    logits = jnp.where(allowed, logits, -jnp.inf)
    peak = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    weights = jnp.exp(logits - jnp.where(jnp.isfinite(peak), peak, 0.0))
    total = weights.sum(-1, keepdims=True)
    weights = weights / jnp.where(total > 0, total, 1.0)
    out = jnp.einsum("bgqsm,bmgn->bsgqn", weights.astype(v.dtype), v)
    return out.reshape(batch, length, heads, head_dim)
