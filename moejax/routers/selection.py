"""What every router does alike: logits that are intervened in, the k best, replayed choices."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float, Int

from moejax.types import Context


def intervened(logits: Float[Array, "T E"], context: Context) -> Float[Array, "T E"]:
    """The logits to route by: those that `context.intervention` makes of the router's own."""
    if context.intervention is None:
        return logits
    return context.intervention(logits, context).astype(logits.dtype)


def select(adjusted: Float[Array, "T E"], k: int, context: Context) -> Int[Array, "T K"]:
    """The `k` experts of highest score for each token, ties to the lower id.

    Where `context.selection` is given, those instead: what another run of the same tokens chose.
    """
    if context.selection is not None:
        return context.selection
    return jax.lax.top_k(adjusted, k)[1].astype("int32")
