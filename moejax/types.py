"""The dimension legend and the pytrees that every part of moejax shares.

Dimension letters, used in every docstring, shape annotation and comment:

    B  batch (sequences)        S  sequence length        T  tokens (B * S, flattened)
    D  model width              F  expert (or MLP) width  V  vocabulary
    E  experts                  K  experts per token      R  rows of a grouped matmul
    G  groups                   H  query heads            N  head width
    L  layers                   P  devices

A *term* is a pair ``(sum, count)``: sums and counts are added separately over tokens, layers,
microbatches and devices, and divided only once, at the end. A mean of means is never taken.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int

AnyArray = ArrayLike | jax.ShapeDtypeStruct  # on devices, on the host, or shape and dtype alone
Term = tuple[Array, Array]  # (sum, count), both scalars of at least float32
Terms = dict[str, Term]
Stats = dict[str, Any]  # nested dictionaries of arrays that add up over microbatches and devices


def pytree(cls=None, *, static: tuple[str, ...] = ()):
    """Frozen dataclass, registered as a pytree; `static` fields are part of the tree structure."""

    def wrap(c):
        c = dataclasses.dataclass(frozen=True, kw_only=True)(c)
        names = [f.name for f in dataclasses.fields(c)]
        data = [n for n in names if n not in static]
        jax.tree_util.register_dataclass(c, data_fields=data, meta_fields=list(static))
        return c

    return wrap(cls) if cls is not None else wrap


def at_least_f32(dtype: Any) -> jnp.dtype:
    """The dtype that moejax means by "f32": float32, or float64 in a float64 run."""
    return jnp.promote_types(dtype, jnp.float32)


@pytree
class Batch:
    """One batch of packed sequences. Everything is `[B, S]`.

    A position belongs to padding exactly when its segment id is 0. `targets[b, s]` is the token
    that follows `tokens[b, s]` in the same segment; where there is none, `loss_mask` is False.
    """

    tokens: Int[AnyArray, "B S"]
    targets: Int[AnyArray, "B S"]
    loss_mask: Bool[AnyArray, "B S"]
    segment_ids: Int[AnyArray, "B S"]  # 0 is padding; 1, 2, ... number the packed documents
    positions: Int[AnyArray, "B S"]  # from 0 within each segment
    sources: Int[AnyArray, "B S"] | None = None  # of a mixture: which source the row comes from


@pytree(static=("num_experts", "record", "decode", "cache_length", "window"))
class Context:
    """What a layer may know besides its input. Per-token fields are `[B, S]`.

    `key` holds a key for each row of the batch, already folded with the step, the row's number and
    the global layer index: a layer folds in a stream id of its own (`layers/row_keys.py`), so that
    nothing random depends on the layout. It is None when nothing may be random (evaluation).
    """

    token_mask: Bool[ArrayLike, "B S"]  # False is padding and never counts
    segment_ids: Int[ArrayLike, "B S"]
    positions: Int[ArrayLike, "B S"]
    token_ids: Int[ArrayLike, "B S"]
    step: Int[Array, ""]
    layer_index: Int[Array, ""] | int = 0
    key: Array | None = None  # [B]
    task_ids: Int[ArrayLike, "B S"] | None = None  # which task a row belongs to, along the row
    loads: Float[Array, "E"] | None = None  # global-batch share of choices per expert, sum 1
    selection: Int[Array, "T K"] | None = None  # choices to replay instead of the router's own
    selection_bias: Float[Array, "E"] | None = None  # added to router scores, for selection only
    intervention: Any = None  # (router logits [T, E], context) -> the logits to route by
    router_carry: Any = None  # per-token value from the previous MoE layer's router
    num_experts: int | None = None
    record: bool = False  # statistics hold the routing of every token, as `trace`
    decode: bool = False  # keys and values live in the collection `cache`
    cache_length: int | None = None
    window: int | None = None  # sliding window of this layer, in positions

    def replace(self, **changes) -> Context:
        return dataclasses.replace(self, **changes)


@pytree
class Routing:
    """A router's decision for T tokens. Arithmetic in at least float32.

    `experts[t, j]` outside `[0, E)` is an empty slot (its weight is 0 and nothing is computed);
    the customary empty id is E. `probs` and `logits` are over all E experts, for losses and
    statistics. `extras` holds named terms and statistics that add up over tokens, and
    `log_prob` where a router samples.
    """

    experts: Int[Array, "T K"]
    weights: Float[Array, "T K"]
    probs: Float[Array, "T E"]
    logits: Float[Array, "T E"]
    extras: dict[str, Any]


def add_terms(a: Terms, b: Terms) -> Terms:
    """Adds sums and counts name by name; a name that only one side has is kept."""
    out = dict(a)
    for name, (total, count) in b.items():
        s, c = out.get(name, (0.0, 0.0))
        out[name] = (s + total, c + count)
    return out


def mean(term: Term) -> Array:
    """sum / count, and 0 where nothing was counted."""
    total, count = term
    return jnp.where(count > 0, total / jnp.where(count > 0, count, 1), 0)


def tree_of(leaves: dict[str, Any]) -> dict[str, Any]:
    """Nested dictionaries from {path: leaf}; `named_leaves` of such a tree is the inverse."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def named_leaves(tree: Any) -> dict[str, Any]:
    """{path: leaf} in the order in which jax flattens `tree`; a path is its keys joined by '/'.

    Raises ValueError where two leaves would get one path (a key that itself holds a '/').
    """
    out: dict[str, Any] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        if path in out:
            raise ValueError(f"two leaves have the path {path!r}; rename a key that holds a '/'")
        out[path] = leaf
    return out
