"""What one forward pass of a model gives."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Float

from moejax.types import Stats, Terms

Variables = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """What one forward pass gives.

    `logits` are at least float32 `[B, S, V]`; `terms` are unweighted (sum, count) pairs over
    tokens and MoE layers; `stats` holds `{segment: {statistic: [count, ...]}}`; `cache` is the
    new decoding cache (empty unless decoding).
    """

    logits: Float[Array, "B S V"]
    terms: Terms
    stats: Stats
    cache: Variables


jax.tree_util.register_dataclass(
    Output, data_fields=["logits", "terms", "stats", "cache"], meta_fields=[]
)
