"""Softmax attention of a few queries over whole rows of keys, whose backward pass keeps no scores.

Vaswani et al., arXiv 1706.03762. What is kept for the gradient is queries, keys, values, the result
and two numbers per query; the scores, as long as the keys for every query, are computed a second
time, as in FlashAttention (Dao et al., arXiv 2205.14135, algorithm 4).
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from moejax.types import at_least_f32


class Logits(NamedTuple):
    """What a logit is: `scale q k`, and with a cap `soft_cap tanh(scale q k / soft_cap)`."""

    scale: float
    soft_cap: float | None = None


def softmax_attention(
    q: Float[Array, "B Hkv Q S N"],
    k: Float[Array, "B Hkv M N"],
    v: Float[Array, "B Hkv M Nv"],
    allowed: Bool[Array, "#B S M"],
    sinks: Float[Array, "H"] | None = None,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> Float[Array, "B Hkv Q S Nv"]:
    """softmax(scale q k^T) v over the allowed keys; a query with none allowed gives 0.

    Q = H / Hkv queries share a key. `sinks` are logits of one more key per head, of value 0; they
    are not capped. `scale` is 1 / sqrt(N) when None; values may have a width Nv of their own.
    Softmax and its sums are in at least float32. There are gradients of the first order, by
    everything but `allowed`. Keys and values must be finite, those that no query may see too.
    """
    if sinks is not None:
        sinks = sinks.astype(at_least_f32(q.dtype)).reshape(k.shape[1], -1, 1, 1)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    return _attention(Logits(scale, soft_cap), q, k, v, allowed, sinks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
    how: Logits, q: Array, k: Array, v: Array, allowed: Array, sinks: Array | None
) -> Array:
    return _forward(how, q, k, v, allowed, sinks)[0]


def _forward(how: Logits, q: Array, k: Array, v: Array, allowed: Array, sinks: Array | None) -> Any:
    logits = masked_logits(how, q, k, allowed)
    peak = logits.max(-1, keepdims=True)
    if sinks is not None:
        peak = jnp.maximum(peak, sinks)
    peak = jnp.where(peak == -jnp.inf, 0, peak)
    weights = jnp.exp(logits - peak)
    total = weights.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + jnp.exp(sinks - peak)
    total = jnp.where(total > 0, total, 1)
    # Dividing [.., S, Nv] rather than [.., S, M] is the same and touches less.
    out = (weighted_sum(weights, v) / total).astype(v.dtype)
    return out, (q, k, v, allowed, sinks, out, peak, total)


def _backward(how: Logits, kept: Any, d_out: Array) -> tuple[Any, ...]:
    # Or the compiler would keep the scores of a forward pass that is recomputed beside this one.
    (q, k, v, allowed, sinks, out, peak, total), d_out = lax.optimization_barrier((kept, d_out))
    d_out, mean = divided(d_out, out, total)
    d_q, d_k, d_v = gradients(how, q, k, v, allowed, peak, d_out, mean)
    d_sinks = None if sinks is None else gradient_of_sinks(sinks, peak, mean)
    no_gradient = np.zeros(allowed.shape, jax.dtypes.float0)
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), no_gradient, d_sinks


_attention.defvjp(_forward, _backward)


def masked_logits(how: Logits, q: Array, k: Array, allowed: Array) -> Array:
    """`[B, Hkv, Q, S, M]`, -inf where not `allowed` `[B, S, M]`."""
    logits = einsum("bgrn,bgmn->bgrm", rows(q * how.scale), k).reshape(*q.shape[:-1], -1)
    if how.soft_cap is not None:
        logits = how.soft_cap * jnp.tanh(logits / how.soft_cap)
    return jnp.where(allowed[:, None, None], logits, -jnp.inf)


def weighted_sum(weights: Array, v: Array) -> Array:
    """`[B, Hkv, Q, S, Nv]` of `weights` `[B, Hkv, Q, S, M]`, in at least float32."""
    out = einsum("bgrm,bgmn->bgrn", rows(weights.astype(v.dtype)), v)
    return out.reshape(*weights.shape[:-1], v.shape[-1])


def divided(d_out: Array, out: Array, total: Array) -> tuple[Array, Array]:
    """(d_out / total, its product with `out`), in the dtype of `total`.

    Weights are not yet divided by `total` where they are used again: `d_out` is, which is shorter.
    The product is the sum over keys of weights * d_weights, without forming it.
    """
    d_out = d_out.astype(total.dtype) / total
    return d_out, jnp.sum(d_out * out.astype(total.dtype), axis=-1, keepdims=True)


def gradients(
    how: Logits,
    q: Array,
    k: Array,
    v: Array,
    allowed: Array,
    peak: Array,
    d_out: Array,
    mean: Array,
) -> tuple[Array, Array, Array]:
    """(d_q, d_k, d_v) of these queries and keys alone, in at least float32.

    `peak` is what was subtracted from a query's logits; `d_out` and `mean` are those of `divided`.
    """
    logits = masked_logits(how, q, k, allowed)
    weights = jnp.exp(logits - peak)
    d_out = rows(d_out.astype(v.dtype))
    d_v = einsum("bgrm,bgrn->bgmn", rows(weights.astype(v.dtype)), d_out)
    d_weights = einsum("bgrn,bgmn->bgrm", d_out, v).reshape(weights.shape)
    d_logits = weights * (d_weights - mean)
    if how.soft_cap is not None:  # tanh' = 1 - tanh^2; a logit that is not allowed is -inf
        slope = 1 - jnp.square(logits / how.soft_cap)
        d_logits = jnp.where(allowed[:, None, None], d_logits * slope, 0)
    d_logits = rows(d_logits.astype(q.dtype))
    d_q = how.scale * einsum("bgrm,bgmn->bgrn", d_logits, k).reshape(q.shape)
    d_k = how.scale * einsum("bgrm,bgrn->bgmn", d_logits, rows(q))
    return d_q, d_k, d_v


def gradient_of_sinks(sinks: Array, peak: Array, mean: Array) -> Array:
    """`[Hkv, Q, 1, 1]`: a sink takes weight from what has the value that `mean` says."""
    return -jnp.sum(jnp.exp(sinks - peak) * mean, axis=(0, -2), keepdims=True)[0]


def heads_first(
    q: Float[Array, "B S H N"], k: Float[Array, "B M Hkv N"], v: Float[Array, "B M Hkv Nv"]
) -> tuple[Array, Array, Array]:
    """(q [B, Hkv, H/Hkv, S, N], k [B, Hkv, M, N], v [B, Hkv, M, Nv]).

    The barrier keeps norm and rotation of q and k from being computed again for every block of
    queries that reads them.
    """
    batch, length, _, head_dim = q.shape
    q = q.reshape(batch, length, k.shape[2], -1, head_dim).transpose(0, 2, 3, 1, 4)
    return lax.optimization_barrier((q, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)))


def heads_last(out: Float[Array, "B Hkv Q S N"]) -> Float[Array, "B S H N"]:
    """The inverse of `heads_first` for queries."""
    batch, _, _, length, head_dim = out.shape
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, -1, head_dim)


def rows(x: Array) -> Array:
    """`[B, Hkv, Q, S, ...]` to `[B, Hkv, Q S, ...]`: one matrix for all that share a key."""
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def einsum(spec: str, a: Array, b: Array) -> Array:
    """In at least float32."""
    return jnp.einsum(spec, a, b, preferred_element_type=at_least_f32(a.dtype))
