"""Softmax attention of a few queries to a few keys: what every implementation does per tile.

A part of attention is a pair (result, log-sum-exp) over some of a query's keys. Two parts make one
by the weights exp(lse - total). The gradient needs no parts: with the result and log-sum-exp over
all keys a tile's probabilities are exp(scores - lse), whoever else the query attends. (Dao et al.,
arXiv 2205.14135.)
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float

from moejax.types import at_least_f32


def attend(
    q: Float[Array, "r d"],
    k: Float[Array, "c d"],
    v: Float[Array, "c dv"],
    *,
    scale: float,
    allowed: Bool[Array, "#r #c"] | None = None,
) -> tuple[Float[Array, "r dv"], Float[Array, " r"]]:
    """(result, log-sum-exp), in at least float32; 0 and -inf for a query without keys.

    Args:
      q, k, v: queries, keys, values; keys and values are finite.
      scale: of the scores.
      allowed: who may attend whom; None for everyone.
    """
    score = _scores(q, k, scale, allowed)
    peak = jnp.max(score, axis=1)
    if allowed is not None:
        peak = jnp.where(peak == -jnp.inf, 0, peak)
    weight = jnp.exp(score - peak[:, None])
    total = jnp.sum(weight, axis=1)
    out = _dot(weight.astype(v.dtype), v, 1, 0)
    if allowed is None:
        return out / total[:, None], peak + jnp.log(total)
    some = total > 0
    out = out / jnp.where(some, total, 1)[:, None]
    return out, jnp.where(some, peak + jnp.log(jnp.where(some, total, 1)), -jnp.inf)


def attend_gradients(
    q: Float[Array, "r d"],
    k: Float[Array, "c d"],
    v: Float[Array, "c dv"],
    d_out: Float[Array, "r dv"],
    lse: Float[Array, " r"],
    mean: Float[Array, " r"],
    *,
    scale: float,
    allowed: Bool[Array, "#r #c"] | None = None,
) -> tuple[Float[Array, "r d"], Float[Array, "c d"], Float[Array, "c dv"]]:
    """This tile's part of (dq, dk, dv), in at least float32.

    Args:
      q, k, v, scale, allowed: as for `attend`.
      d_out: the cotangent of the result over all keys.
      lse: the log-sum-exp over all keys.
      mean: the sum over the width of `d_out` times that result.
    """
    # Keys by queries: on CPU two products of five then need no transposed copy (1.2 times as fast).
    weight = jnp.exp(_scores(k, q, scale, None) - lse)
    if allowed is not None:
        weight = jnp.where(allowed.T, weight, 0)
    d_v = _dot(weight.astype(v.dtype), d_out, 1, 0)
    d_score = weight * (_dot(v, d_out, 1, 1) - mean) * scale
    d_score = d_score.astype(q.dtype)
    return _dot(d_score, k, 0, 0), _dot(d_score, q, 1, 0), d_v


def merge(
    out: Float[Array, "*r dv"],
    lse: Float[Array, "*r"],
    other: Float[Array, "*r dv"],
    other_lse: Float[Array, "*r"],
) -> tuple[Float[Array, "*r dv"], Float[Array, "*r"]]:
    """Two parts as one; a part without keys changes nothing."""
    total = jnp.logaddexp(lse, other_lse)
    weight, other_weight = share(lse, total), share(other_lse, total)
    return out * weight[..., None] + other * other_weight[..., None], total


def share(lse: Float[Array, "..."], total: Float[Array, "..."]) -> Float[Array, "..."]:
    """What a part counts for in the whole: exp(lse - total), and 0 where there are no keys."""
    return jnp.where(lse == -jnp.inf, 0, jnp.exp(lse - total))


def _scores(q: Array, k: Array, scale: float, allowed: Array | None) -> Array:
    score = _dot(q, k, 1, 1) * scale
    return score if allowed is None else jnp.where(allowed, score, -jnp.inf)


def _dot(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
    acc = at_least_f32(jnp.result_type(a, b))
    dims = (((axis_a,), (axis_b,)), ((), ()))
    return lax.dot_general(a, b, dims, preferred_element_type=acc)
