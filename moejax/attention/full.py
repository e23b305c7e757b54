"""Causal softmax attention: grouped queries, RoPE, QK-norm, window, sinks, soft cap, KV cache.

Vaswani et al., arXiv 1706.03762; grouped queries, Ainslie et al., arXiv 2305.13245; sinks, Xiao
et al., arXiv 2309.17453, as a learned logit per head in gpt-oss, arXiv 2508.10925; soft-capped
logits, Gemma 2, arXiv 2408.00118.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import flax.linen as nn
import jax.numpy as jnp
from flax.linen import initializers
from jaxtyping import Array, ArrayLike, Float, Int

from moejax.errors import UserError
from moejax.kernels.full_attention import full_attention
from moejax.layers import decoding_cache, grouped_heads
from moejax.layers.grouped_heads import over_slots
from moejax.layers.linear import Linear
from moejax.layers.norm import RMSNorm
from moejax.layers.rope import Rope
from moejax.parallel.context_parallel import FewestBytes, Way, without_devices
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
      key_conv: prototype of a short convolution over the keys, after their norm and before RoPE
        (`ShortConvolution()`), so that scores still depend on distances alone; None for none.
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
    key_conv: nn.Module | None = None
    use_bias: bool = False
    use_output_bias: bool = False
    use_sinks: bool = False
    soft_cap: float | None = None
    linear: nn.Module = dataclasses.field(default_factory=Linear)
    implementation: str | None = None
    context_parallel: Way = dataclasses.field(default_factory=FewestBytes)

    @nn.compact
    def __call__(self, x: Float[Array, "B S D"], context: Context) -> Float[Array, "B S D"]:
        if self.soft_cap is not None and not 0 < self.soft_cap < math.inf:
            raise UserError(
                f"attention.soft_cap={self.soft_cap} must be positive and finite, or None for no "
                "cap"
            )
        q, k, v = grouped_heads.projected(self, x, context)
        sinks = None
        if self.use_sinks:
            zeros = nn.with_logical_partitioning(initializers.zeros, ("heads",))
            sinks = self.param("sinks", zeros, (self.num_heads,), jnp.float32)
        if context.decode:
            keys, values = decoding_cache.keys_and_values(self, k, v, context)
            out = over_slots(q, keys, values, context, sinks, soft_cap=self.soft_cap)
            out = decoding_cache.where_slots_are(out, context)
        else:
            attend = functools.partial(
                over_rows,
                window=context.window,
                soft_cap=self.soft_cap,
                implementation=self.implementation,
            )
            # Initialisation has a row of any length.
            way = without_devices if self.is_initializing() else self.context_parallel
            per_head = () if sinks is None else (sinks,)
            out = way(attend, q, k, v, context.segment_ids, *per_head)
        return grouped_heads.output(self, out, x.shape[-1], context)

    def full(self) -> FullAttention:
        """Itself: see `moejax.attention`."""
        return self


def over_rows(
    q: Float[Array, "B S H N"],
    k: Float[Array, "B M Hkv N"],
    v: Float[Array, "B M Hkv N"],
    segment_ids: Int[ArrayLike, "B M"],
    q_offset: int | Int[ArrayLike, ""],
    *sinks: Float[Array, "H"],
    window: int | None,
    soft_cap: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B S H N"]:
    """What a way of `moejax.parallel.context_parallel` calls; `sinks` is one array or none."""
    return full_attention(
        q,
        k,
        v,
        segment_ids=segment_ids,
        window=window,
        sinks=sinks[0] if sinks else None,
        soft_cap=soft_cap,
        q_offset=q_offset,
        implementation=implementation,
    )


def example() -> FullAttention:
    """A small instance, for the contract tests."""
    return FullAttention(num_heads=4, num_kv_heads=2, qk_norm=RMSNorm(), use_sinks=True)
