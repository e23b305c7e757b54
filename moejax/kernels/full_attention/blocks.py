"""Blocks of queries times blocks of keys: full attention for rows of any length, in plain JAX.

The softmax of a block of queries is built up over blocks of keys (Milakov and Gimelshein, arXiv
1805.02867); the gradient needs the result and two numbers per query (Dao et al., arXiv 2205.14135).
Which blocks of keys a block of queries meets is computed from its position while the program runs,
so that the first query's position may be unknown until then.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from moejax.kernels import compat
from moejax.kernels.full_attention.call import Call, in_reach, same_segment
from moejax.kernels.full_attention.softmax import (
    Logits,
    divided,
    gradient_of_sinks,
    gradients,
    heads_first,
    heads_last,
    masked_logits,
    weighted_sum,
)
from moejax.types import at_least_f32

# Of a block. On CPU 128 take 1.05 to 1.65 times as long and 512 take 1.15 to 1.6, forward and
# backward, at 1024 and 4096 positions. Elsewhere not measured.
QUERIES, KEYS = 256, 256


class _Form(NamedTuple):
    """What is known before the program runs: logits, window, sizes of blocks."""

    logits: Logits
    window: int | None
    queries: int
    keys: int


class _Where(NamedTuple):
    """Position of the first query, and segment ids of queries `[B, S]` and keys `[B, M]`."""

    offset: Array
    queries: Array | None
    keys: Array | None


def attention(q: Array, k: Array, v: Array, call: Call) -> Array:
    """`[B, S, H, Nv]`; arguments as of the public `full_attention`."""
    length, num_keys, kv_heads = q.shape[1], k.shape[1], k.shape[2]
    form = _Form(
        logits=Logits(call.scale, call.soft_cap),
        window=call.window,
        queries=_even(length, QUERIES),
        keys=_even(num_keys, KEYS),
    )
    sinks = call.sinks
    if sinks is not None:
        sinks = sinks.astype(at_least_f32(q.dtype)).reshape(kv_heads, -1, 1, 1)
    segments = None, None
    if call.segment_ids is not None:
        fill = lambda ids, block: jnp.pad(ids, ((0, 0), (0, -ids.shape[1] % block)))
        segments = (
            fill(call.query_segments(length), form.queries),
            fill(call.segment_ids, form.keys),
        )
    where = _Where(jnp.asarray(call.q_offset, jnp.int32), *segments)
    q, k, v = heads_first(q, k, v)
    # Filled up behind: no query that is asked for can see a key there, and the others are cut off.
    q, k, v = _filled(q, form.queries), _filled(k, form.keys), _filled(v, form.keys)
    out = _attention(form, *compat.vary_alike((q, k, v, sinks, where)))
    return heads_last(out[..., :length, :])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
    form: _Form, q: Array, k: Array, v: Array, sinks: Array | None, where: _Where
) -> Array:
    return _forward(form, q, k, v, sinks, where)[0]


def _forward(
    form: _Form, q: Array, k: Array, v: Array, sinks: Array | None, where: _Where
) -> tuple[Array, Any]:
    wide = at_least_f32(q.dtype)
    per_query = (*q.shape[:3], form.queries, 1)

    def of_queries(i: Array) -> tuple[Array, Array, Array]:
        own = _block(q, i, form.queries)

        def step(j: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            out, peak, total = state
            key, value = _block(k, j, form.keys), _block(v, j, form.keys)
            logits = masked_logits(form.logits, own, key, _allowed(form, where, i, j))
            higher = jnp.maximum(peak, logits.max(-1, keepdims=True))
            finite = _finite(higher)
            weights, shrink = jnp.exp(logits - finite), jnp.exp(peak - finite)
            total = shrink * total + weights.sum(-1, keepdims=True)
            return shrink * out + weighted_sum(weights, value), higher, total

        zeros = compat.zeros(per_query, wide, like=q)
        out = compat.zeros((*q.shape[:3], form.queries, v.shape[-1]), wide, like=q)
        start = (out, zeros - jnp.inf, zeros) if sinks is None else (out, zeros + sinks, zeros + 1)
        out, peak, total = lax.fori_loop(*_keys_of(form, where, i, k), step, start)
        total = jnp.where(total > 0, total, 1)
        return (out / total).astype(v.dtype), _finite(peak), total

    parts = lax.map(of_queries, jnp.arange(q.shape[-2] // form.queries))
    out, peak, total = map(_joined, parts)
    return out, (q, k, v, sinks, where, out, peak, total)


def _backward(form: _Form, kept: Any, d_out: Array) -> tuple[Any, ...]:
    q, k, v, sinks, where, out, peak, total = kept
    d_out, mean = divided(d_out, out, total)
    wide = at_least_f32(q.dtype)

    def of_keys(d_q: Array, j: Array) -> tuple[Array, tuple[Array, Array]]:
        key, value = _block(k, j, form.keys), _block(v, j, form.keys)

        def step(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            d_q, d_key, d_value = state
            of_query = [_block(x, i, form.queries) for x in (q, peak, d_out, mean)]
            own, *rest = of_query
            allowed = _allowed(form, where, i, j)
            more = gradients(form.logits, own, key, value, allowed, *rest)
            d_own = _block(d_q, i, form.queries) + more[0]
            d_q = lax.dynamic_update_slice_in_dim(d_q, d_own, i * form.queries, axis=-2)
            return d_q, d_key + more[1], d_value + more[2]

        zeros = [compat.zeros(x.shape, wide, like=q) for x in (key, value)]
        d_q, d_key, d_value = lax.fori_loop(*_queries_of(form, where, j, q), step, (d_q, *zeros))
        return d_q, (d_key.astype(k.dtype), d_value.astype(v.dtype))

    start = compat.zeros(q.shape, wide, like=q)
    d_q, parts = lax.scan(of_keys, start, jnp.arange(k.shape[-2] // form.keys))
    d_k, d_v = map(_joined, parts)
    d_sinks = None if sinks is None else gradient_of_sinks(sinks, peak, mean)
    no_gradient = jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), where)
    return d_q.astype(q.dtype), d_k, d_v, d_sinks, no_gradient


_attention.defvjp(_forward, _backward)


def _allowed(form: _Form, where: _Where, i: Array, j: Array) -> Array:
    """`[B or 1, queries, keys]` of query block i and key block j."""
    query = where.offset + i * form.queries + jnp.arange(form.queries)
    key = j * form.keys + jnp.arange(form.keys)
    allowed = in_reach(query, key, form.window)[None]
    if where.queries is None:
        return allowed
    own = lax.dynamic_slice_in_dim(where.queries, i * form.queries, form.queries, axis=1)
    seen = lax.dynamic_slice_in_dim(where.keys, j * form.keys, form.keys, axis=1)
    return allowed & same_segment(own, seen)


def _keys_of(form: _Form, where: _Where, i: Array, k: Array) -> tuple[Array, Array]:
    """The blocks of keys, [first, last), that some query of block i may see."""
    first, last = where.offset + i * form.queries, where.offset + (i + 1) * form.queries - 1
    stop = jnp.minimum(last // form.keys + 1, k.shape[-2] // form.keys)
    if form.window is None:
        return jnp.zeros_like(stop), stop
    return jnp.maximum((first - form.window + 1) // form.keys, 0), stop


def _queries_of(form: _Form, where: _Where, j: Array, q: Array) -> tuple[Array, Array]:
    """The blocks of queries, [first, last), of which some query may see a key of block j."""
    first, last = j * form.keys - where.offset, (j + 1) * form.keys - 1 - where.offset
    start = jnp.maximum(first // form.queries, 0)
    stop = jnp.full_like(start, q.shape[-2] // form.queries)
    if form.window is None:
        return start, stop
    return start, jnp.minimum((last + form.window - 1) // form.queries + 1, stop)


def _block(x: Array, index: Array, size: int) -> Array:
    return lax.dynamic_slice_in_dim(x, index * size, size, axis=-2)


def _joined(parts: Array) -> Array:
    """`[n, .., b, X]` to `[.., n b, X]`."""
    parts = jnp.moveaxis(parts, 0, -3)
    return parts.reshape(*parts.shape[:-3], -1, parts.shape[-1])


def _filled(x: Array, block: int) -> Array:
    fill = -x.shape[-2] % block
    return jnp.pad(x, (*((0, 0),) * (x.ndim - 2), (0, fill), (0, 0))) if fill else x


def _even(length: int, most: int) -> int:
    """The size of as many blocks as are needed, all alike."""
    return -(-length // -(-length // most))


def _finite(peak: Array) -> Array:
    return jnp.where(peak == -jnp.inf, 0, peak)
