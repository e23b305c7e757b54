"""Causal softmax attention: grouped queries, RoPE, QK-norm, window, sinks, soft cap, KV cache.

Vaswani et al., arXiv 1706.03762; grouped queries, Ainslie et al., arXiv 2305.13245; sinks, Xiao
et al., arXiv 2309.17453, as a learned logit per head in gpt-oss, arXiv 2508.10925; soft-capped
logits, Gemma 2, arXiv 2408.00118.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import initializers
from jaxtyping import Array, Float

from moejax.errors import UserError
from moejax.kernels.full_attention import full_attention
from moejax.kernels.full_attention.softmax import heads_first, heads_last, softmax_attention
from moejax.layers import decoding_cache
from moejax.layers.linear import Linear
from moejax.layers.norm import RMSNorm
from moejax.layers.rope import Rope
from moejax.parallel.context_parallel import FewestBytes, Way
from moejax.types import Context


class FullAttention(nn.Module):
    """Attention over every earlier position of the same segment, and the position itself.

    With `context.window` W, over the last W of these only (the own position is one of them).

    Attributes:
      num_heads: query heads H.
      num_kv_heads: key and value heads; must divide H.
      head_dim: width N of a head; `D / num_heads` when None.
      rope: rotary embedding, or None for none (NoPE).
      qk_norm: prototype of a norm on queries and on keys `[B, S, H, N]`, before RoPE: `RMSNorm()`
        per head (Qwen3), `RMSNorm(num_axes=2)` over all heads at once (OLMoE); None for none.
      use_bias: biases on the query, key and value projections.
      use_output_bias: a bias on the output projection.
      use_sinks: a learned logit per head joins every softmax and has no value: attention to it is
        attention to nothing (gpt-oss).
      soft_cap: logits become `soft_cap tanh(logits / soft_cap)` (Gemma 2); None leaves them.
      linear: prototype of the four projections; adapters replace it.
      implementation: of the kernel in training; None lets it choose.
      context_parallel: how queries meet keys on other devices where `mesh.context` splits rows, of
        `moejax.parallel.context_parallel`; by default what moves fewest bytes.

    Softmax and its sums are in at least float32. Decoding keeps keys and values in the
    collection `cache`, one slot per position, so a row of the batch is one sequence; a position
    without a slot gives NaN rather than an answer that forgets.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int | None = None
    rope: Rope | None = dataclasses.field(default_factory=Rope)
    qk_norm: nn.Module | None = None
    use_bias: bool = False
    use_output_bias: bool = False
    use_sinks: bool = False
    soft_cap: float | None = None
    linear: nn.Module = dataclasses.field(default_factory=Linear)
    implementation: str | None = None
    context_parallel: Way = dataclasses.field(default_factory=FewestBytes)

    @nn.compact
    def __call__(self, x: Float[Array, "B S D"], context: Context) -> Float[Array, "B S D"]:
        batch, length, d_model = x.shape
        head_dim = self._head_dim(d_model)

        def project(name: str, heads: int) -> Array:
            features, axes = heads * head_dim, ("embed", "heads")
            linear = self.linear.copy(
                features=features, use_bias=self.use_bias, axes=axes, name=name
            )
            y = linear(x, context).reshape(batch, length, heads, head_dim)
            if self.qk_norm is None or name == "value":
                return y
            return self.qk_norm.copy(name=f"{name}_norm")(y)

        q = project("query", self.num_heads)
        k = project("key", self.num_kv_heads)
        v = project("value", self.num_kv_heads)
        q, k = jax.lax.optimization_barrier((q, k))  # the norm is computed once, not per reader
        if self.rope is not None:
            q, k = (self.rope(y, context.positions, context.cache_length) for y in (q, k))
        sinks = None
        if self.use_sinks:
            zeros = nn.with_logical_partitioning(initializers.zeros, ("heads",))
            sinks = self.param("sinks", zeros, (self.num_heads,), jnp.float32)
        if context.decode:
            out = self._attend_cache(q, k, v, context, sinks)
        else:
            out = self._attend(q, k, v, context, sinks)
        output = self.linear.copy(
            features=d_model, use_bias=self.use_output_bias, axes=("heads", "embed"), name="output"
        )
        return output(out.reshape(batch, length, -1), context)

    def _head_dim(self, d_model: int) -> int:
        if min(self.num_heads, self.num_kv_heads) < 1 or self.num_heads % self.num_kv_heads:
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

    def _attend(self, q: Array, k: Array, v: Array, context: Context, sinks: Array | None) -> Array:
        def attend(q: Array, k: Array, v: Array, ids: Array, offset: Any, *sinks: Array) -> Array:
            return full_attention(
                q,
                k,
                v,
                segment_ids=ids,
                window=context.window,
                sinks=sinks[0] if sinks else None,
                soft_cap=self.soft_cap,
                q_offset=offset,
                implementation=self.implementation,
            )

        per_head = () if sinks is None else (sinks,)
        if self.is_initializing():  # with a row of any length
            return attend(q, k, v, context.segment_ids, 0, *per_head)
        return self.context_parallel(attend, q, k, v, context.segment_ids, *per_head)

    def _attend_cache(
        self, q: Array, k: Array, v: Array, context: Context, sinks: Array | None
    ) -> Array:
        """Writes k and v at their positions, then attends to every slot up to the query's own."""
        batch, length, heads, head_dim = k.shape
        shape = (batch, decoding_cache.num_slots(length, context), heads, head_dim)
        keys = self.variable("cache", "cached_key", jnp.zeros, shape, k.dtype)
        values = self.variable("cache", "cached_value", jnp.zeros, shape, v.dtype)
        keys.value = decoding_cache.write(keys.value, k, context)
        values.value = decoding_cache.write(values.value, v, context)
        out = softmax_attention(
            *heads_first(q, keys.value, values.value),
            decoding_cache.visible(context),
            sinks,
            soft_cap=self.soft_cap,
        )
        return decoding_cache.where_slots_are(heads_last(out), context)


def example() -> FullAttention:
    """A small instance, for the contract tests."""
    return FullAttention(num_heads=4, num_kv_heads=2, qk_norm=RMSNorm(), use_sinks=True)
