"""What every router does alike: logits that are intervened in, the k best, replayed choices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.types import Context


def intervened(logits: Float[Array, "T E"], context: Context) -> Float[Array, "T E"]:
    """The logits to route by: those that `context.intervention` makes of the router's own."""
    if context.intervention is None:
        return logits
    return context.intervention(logits, context).astype(logits.dtype)


def select(adjusted: Float[Array, "T E"], k: int, context: Context) -> Int[Array, "T K"]:
    """The `k` experts of highest score for each token, ties to the lower id.

    Where `context.selection` is given, those instead: what another run of the same tokens chose,
    empty slots included.
    """
    if context.selection is not None:
        return context.selection
    return jax.lax.top_k(adjusted, k)[1].astype("int32")


def is_held(experts: Int[Array, "T K"], num_experts: int) -> Bool[Array, "T K"]:
    """Which slots hold an expert; the others are empty."""
    return (experts >= 0) & (experts < num_experts)


def own_scores(scores: Float[Array, "T E"], experts: Int[Array, "T K"]) -> Float[Array, "T K"]:
    """Each choice's score, and 0 in an empty slot."""
    # A negative id would count from the end, and one above all give NaN.
    own = jnp.take_along_axis(scores, experts, axis=-1, mode="clip")
    return jnp.where(is_held(experts, scores.shape[-1]), own, 0)
