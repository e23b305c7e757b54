"""Causal softmax attention over whole rows, in memory linear in their length.

Vaswani et al., arXiv 1706.03762; grouped queries, Ainslie et al., arXiv 2305.13245; sinks as a
learned logit per head, gpt-oss, arXiv 2508.10925; soft-capped logits, Gemma 2, arXiv 2408.00118.
"""

from __future__ import annotations

import functools
import importlib
import math
import operator
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import ArrayLike, Float, Int

from moejax.errors import UserError
from moejax.kernels import compat, dispatch
from moejax.kernels.full_attention.call import Call, read_rows

__all__ = ["DTYPES", "IMPLEMENTATIONS", "PRODUCTS", "Call", "full_attention", "obstacle"]

IMPLEMENTATIONS = ("scan", "reference", "cudnn", "splash")
PRODUCTS = ("attention",)  # forward and backward are one choice: they share what is kept
DTYPES = ("bfloat16", "float32", "float16")  # for which the conformance kit has tolerances

_PORTABLE = dispatch.Portable("scan", "it is plain JAX and right everywhere")
_ACCEPTABLE = ("scan", "cudnn", "splash")  # the definition holds all scores at once


def full_attention(
    q: Float[Array, "B S H N"],
    k: Float[Array, "B M Hkv N"],
    v: Float[Array, "B M Hkv Nv"],
    *,
    segment_ids: Int[ArrayLike, "B M"] | None = None,
    window: int | None = None,
    sinks: Float[Array, "H"] | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    q_offset: int | Int[ArrayLike, ""] = 0,
    implementation: str | None = None,
) -> Float[Array, "B S H Nv"]:
    """softmax(scale q k^T) v over the keys up to the query's own, of its segment.

    Query i stands at position `q_offset + i` of the row of keys and sees what is there and before.
    Softmax and its sums are in at least float32; the result has the dtype of `v`. There are
    gradients of the first order by q, k, v and `sinks`. What stands in rows that nobody looks at
    (padding, keys behind the last query or before the first one's window) reaches neither results
    nor gradients, NaN included; padding's own result is 0.

    Args:
      segment_ids: of the keys; a query takes the one at its position and sees only its own segment.
        0 is padding. None for one segment per row.
      window: a query sees this many positions, its own among them; None for all.
      sinks: a logit per query head for one more key, of value 0; not capped.
      soft_cap: logits become `soft_cap tanh(logits / soft_cap)`.
      scale: 1 / sqrt(N) when None.
      q_offset: may be traced; NaN then where the queries do not all stand within the keys.
      implementation: "scan" (plain JAX, memory linear in S), "reference" (the definition, a dense
        mask), "cudnn" (NVIDIA) or "splash" (TPU), both of JAX and not yet run on hardware here.
        None lets `dispatch.choose` pick: "scan", until another was accepted for this kind of
        device.

    Raises:
      ValueError: shapes, or an offset, that do not fit together.
      UserError: a window, cap or implementation that cannot be.
    """
    # Within shard_map, gradients of what several devices share are sums over all of them.
    q, k, v, sinks = compat.vary_alike((q, k, v, sinks))
    if not isinstance(q_offset, jax.core.Tracer):
        q_offset = operator.index(q_offset)
    call = Call(
        segment_ids=None if segment_ids is None else jnp.asarray(segment_ids),
        sinks=sinks,
        window=window,
        soft_cap=soft_cap,
        scale=1.0 / math.sqrt(q.shape[-1]) if scale is None else scale,
        q_offset=q_offset,
    )
    _check(q, k, v, call)
    (name,) = dispatch.choose(
        "full_attention",
        implementation,
        IMPLEMENTATIONS,
        products=PRODUCTS,
        dtype=jnp.dtype(q.dtype).name,
        obstacle=functools.partial(obstacle, q=q, k=k, v=v, call=call),
        portable=_PORTABLE,
        acceptable=_ACCEPTABLE if jnp.dtype(q.dtype).name in DTYPES else (),
    )
    used = read_rows(call, *q.shape[:2], k.shape[1])
    if used is None:
        return module(name).attention(q, k, v, call).astype(v.dtype)
    queries, keys = (rows[..., None, None] for rows in used)
    q, k, v = jnp.where(queries, q, 0), jnp.where(keys, k, 0), jnp.where(keys, v, 0)
    out = jnp.where(queries, module(name).attention(q, k, v, call), 0).astype(v.dtype)
    if call.static_offset is not None:
        return out
    outside = (q_offset < 0) | (q_offset > k.shape[1] - q.shape[1])
    return jnp.where(outside, jnp.nan, out)


def module(name: str) -> ModuleType:
    """The module of an implementation, with `obstacle` and `attention(q, k, v, call)`.

    Imported when first used: Pallas adds half a second to the start of every command.
    """
    return importlib.import_module(f"moejax.kernels.full_attention.{name}")


def obstacle(name: str, q: Any, k: Any, v: Any, call: Call) -> str | None:
    """Why the implementation cannot serve such operands here, or None."""
    return module(name).obstacle(q, k, v, call)


def _check(q: Array, k: Array, v: Array, call: Call) -> None:
    (batch, length, heads, width), (_, num_keys, kv_heads, _) = q.shape, k.shape
    if k.shape != (batch, num_keys, kv_heads, width) or v.shape[:-1] != k.shape[:-1]:
        raise ValueError(
            f"queries {q.shape}, keys {k.shape} and values {v.shape} must agree: [B, S, H, N], "
            "[B, M, Hkv, N] and [B, M, Hkv, Nv]"
        )
    if heads % kv_heads:
        raise ValueError(f"{kv_heads} heads of keys do not divide {heads} heads of queries")
    if call.sinks is not None and call.sinks.shape != (heads,):
        raise ValueError(
            f"sinks of shape {call.sinks.shape} must be one for each of {heads} heads of queries"
        )
    offset = call.static_offset or 0
    if offset < 0 or offset + length > num_keys:
        raise ValueError(
            f"{length} queries from position {offset} on do not fit into {num_keys} keys"
        )
    if call.window is not None and call.window < 1:
        raise UserError(f"window={call.window} must be at least 1: a query sees itself")
    if call.soft_cap is not None and not 0 < call.soft_cap < math.inf:
        raise UserError(f"soft_cap={call.soft_cap} must be positive and finite, or None for no cap")
