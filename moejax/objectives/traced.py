"""Routing traces as objectives read them."""

from __future__ import annotations

import jax
from jaxtyping import Array

from moejax.models.transformer import Transformer
from moejax.types import Stats


def layer_trace(model: Transformer, stats: Stats, layer: int) -> dict[str, Array]:
    """`experts` and `weights` `[T, K]`, `probs` and `logits` `[T, E]` of a global MoE layer."""
    segment, row = model.moe_layers[layer]
    return jax.tree.map(lambda a: a[row], stats[segment]["trace"])


def without_traces(stats: Stats) -> Stats:
    """What adds up over microbatches and devices."""
    drop = lambda own: {name: value for name, value in own.items() if name != "trace"}
    return {segment: drop(own) for segment, own in stats.items()}
