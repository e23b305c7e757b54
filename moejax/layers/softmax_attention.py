"""Softmax attention whose backward pass keeps no scores.

Vaswani et al., arXiv 1706.03762. What is kept for the gradient is queries, keys, values, the result
and two numbers per query; the scores, as long as the keys for every query, are computed a second
time, as in FlashAttention (Dao et al., arXiv 2205.14135, algorithm 4).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from moejax.types import at_least_f32


def softmax_attention(
    q: Float[Array, "B Hkv Q S N"],
    k: Float[Array, "B Hkv M N"],
    v: Float[Array, "B Hkv M Nv"],
    allowed: Bool[Array, "B S M"],
    sinks: Float[Array, "H"] | None = None,
    *,
    scale: float | None = None,
) -> Float[Array, "B Hkv Q S Nv"]:
    """softmax(scale q k^T) v over the allowed keys; a query with none allowed gives 0.

    Q = H / Hkv queries share a key. `sinks` are logits of one more key per head, of value 0.
    `scale` is 1 / sqrt(N) when None; values may have a width Nv of their own.
    Softmax and its sums are in at least float32. There are gradients of the first order, by
    everything but `allowed`. Keys and values must be finite, those that no query may see too:
    `Block` selects padding to zero.
    """
    if sinks is not None:
        sinks = sinks.astype(at_least_f32(q.dtype)).reshape(k.shape[1], -1, 1, 1)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    return _attention(scale, q, k, v, allowed, sinks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
    scale: float, q: Array, k: Array, v: Array, allowed: Array, sinks: Array | None
) -> Array:
    return _forward(scale, q, k, v, allowed, sinks)[0]


def _forward(
    scale: float, q: Array, k: Array, v: Array, allowed: Array, sinks: Array | None
) -> Any:
    logits = _logits(scale, q, k, allowed)
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
    out = _einsum("bgrm,bgmn->bgrn", _rows(weights.astype(v.dtype)), v)
    out = (out.reshape(*q.shape[:-1], v.shape[-1]) / total).astype(v.dtype)
    return out, (q, k, v, allowed, sinks, out, peak, total)


def _backward(scale: float, kept: Any, d_out: Array) -> tuple[Any, ...]:
    """With `weights` not yet divided by `total`; `d_out` is divided instead, which is shorter."""
    # Or the compiler would keep the scores of a forward pass that is recomputed beside this one.
    (q, k, v, allowed, sinks, out, peak, total), d_out = jax.lax.optimization_barrier((kept, d_out))
    weights = jnp.exp(_logits(scale, q, k, allowed) - peak)
    d_out = d_out.astype(total.dtype) / total
    # The sum over keys of weights * d_weights, without forming it.
    mean = jnp.sum(d_out * out.astype(total.dtype), axis=-1, keepdims=True)
    d_out = _rows(d_out.astype(v.dtype))
    d_v = _einsum("bgrm,bgrn->bgmn", _rows(weights.astype(v.dtype)), d_out)
    d_weights = _einsum("bgrn,bgmn->bgrm", d_out, v).reshape(weights.shape)
    d_logits = _rows((weights * (d_weights - mean)).astype(q.dtype))
    d_q = scale * _einsum("bgrm,bgmn->bgrn", d_logits, k).reshape(q.shape)
    d_k = scale * _einsum("bgrm,bgrn->bgmn", d_logits, _rows(q))
    d_sinks = None
    if sinks is not None:
        d_sinks = -jnp.sum(jnp.exp(sinks - peak) * mean, axis=(0, -2), keepdims=True)[0]
    no_gradient = np.zeros(allowed.shape, jax.dtypes.float0)
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), no_gradient, d_sinks


_attention.defvjp(_forward, _backward)


def _logits(scale: float, q: Array, k: Array, allowed: Array) -> Array:
    """`[B, Hkv, Q, S, M]`, -inf where not allowed."""
    logits = _einsum("bgrn,bgmn->bgrm", _rows(q * scale), k).reshape(*q.shape[:-1], -1)
    return jnp.where(allowed[:, None, None], logits, -jnp.inf)


def _rows(x: Array) -> Array:
    """`[B, Hkv, Q, S, ...]` to `[B, Hkv, Q S, ...]`: one matrix for all that share a key."""
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _einsum(spec: str, a: Array, b: Array) -> Array:
    return jnp.einsum(spec, a, b, preferred_element_type=at_least_f32(a.dtype))
