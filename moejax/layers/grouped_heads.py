"""Queries, keys and values of grouped heads, and the way back: what methods of attention share.

Grouped queries, Ainslie et al., arXiv 2305.13245. A method calls these functions from its compact
`__call__`, so the parameters are its own, and methods with the same settings have the same ones.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from moejax.errors import UserError
from moejax.kernels.full_attention.softmax import heads_first, heads_last, softmax_attention
from moejax.layers import decoding_cache
from moejax.layers.rope import Rope
from moejax.types import Context


@runtime_checkable
class GroupedHeads(Protocol):
    """The settings of such a method; `FullAttention` says what each is."""

    num_heads: int
    num_kv_heads: int
    head_dim: int | None
    rope: Rope | None
    qk_norm: nn.Module | None
    key_conv: nn.Module | None
    use_bias: bool
    use_output_bias: bool
    linear: nn.Module


def projected(
    attention: GroupedHeads, x: Float[Array, "B S D"], context: Context
) -> tuple[Float[Array, "B S H N"], Float[Array, "B S Hkv N"], Float[Array, "B S Hkv N"]]:
    """(queries, keys, values): projected, normalised, convolved and rotated, as the settings say.

    Raises UserError where the numbers of heads do not fit together or to D.
    """
    batch, length, d_model = x.shape
    width = head_dim(attention, d_model)

    def project(name: str, heads: int) -> Array:
        linear = attention.linear.copy(
            features=heads * width, use_bias=attention.use_bias, axes=("embed", "heads"), name=name
        )
        y = linear(x, context).reshape(batch, length, heads, width)
        if attention.qk_norm is None or name == "value":
            return y
        return attention.qk_norm.copy(name=f"{name}_norm")(y)

    q = project("query", attention.num_heads)
    k = project("key", attention.num_kv_heads)
    v = project("value", attention.num_kv_heads)
    if attention.key_conv is not None:
        k = attention.key_conv.copy(name="key_convolution")(k, context)
    q, k = jax.lax.optimization_barrier((q, k))  # the norm is computed once, not per reader
    if attention.rope is not None:
        q, k = (attention.rope(y, context.positions, context.cache_length) for y in (q, k))
    return q, k, v


def output(
    attention: GroupedHeads, out: Float[Array, "B S H N"], d_model: int, context: Context
) -> Float[Array, "B S D"]:
    """The output projection of all heads' results."""
    linear = attention.linear.copy(
        features=d_model,
        use_bias=attention.use_output_bias,
        axes=("heads", "embed"),
        name="output",
    )
    return linear(out.reshape(*out.shape[:2], -1), context)


def head_dim(attention: GroupedHeads, d_model: int) -> int:
    """N; UserError where the numbers of heads do not fit together or to D."""
    num_heads, num_kv_heads = attention.num_heads, attention.num_kv_heads
    if min(num_heads, num_kv_heads) < 1 or num_heads % num_kv_heads:
        raise UserError(
            f"attention.num_kv_heads={num_kv_heads} must divide attention.num_heads={num_heads}"
        )
    if attention.head_dim is not None:
        return attention.head_dim
    if d_model % num_heads:
        raise UserError(
            f"attention.num_heads={num_heads} does not divide model.d_model={d_model}; "
            "change one of them or set attention.head_dim"
        )
    return d_model // num_heads


def over_slots(
    q: Float[Array, "B S H N"],
    keys: Float[Array, "B M Hkv N"],
    values: Float[Array, "B M Hkv N"],
    context: Context,
    sinks: Float[Array, "H"] | None = None,
    *,
    soft_cap: float | None = None,
) -> Float[Array, "B S H N"]:
    """Attention to every slot of the decoding cache up to the query's own, within the window."""
    out = softmax_attention(
        *heads_first(q, keys, values), decoding_cache.visible(context), sinks, soft_cap=soft_cap
    )
    return heads_last(out)
