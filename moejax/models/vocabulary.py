"""From token ids to embeddings, and from the last layer's output to logits."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int

from moejax.kernels import compat
from moejax.models.output import Variables
from moejax.parallel.sharding import constrain
from moejax.types import at_least_f32


def embedded(
    params: Variables, tokens: Int[ArrayLike, "B S"], *, dtype: Any
) -> Float[Array, "B S D"]:
    """The embeddings of the ids; NaN for an id of V or more, never another token's embedding."""
    embedding = constrain(params["embed"]["embedding"].astype(dtype), "vocab", "whole")
    return embedding.at[tokens].get(mode="fill", fill_value=jnp.nan)


def logits(
    params: Variables, x: Float[Array, "B S D"], *, tied: bool, soft_cap: float | None
) -> Float[Array, "B S V"]:
    """In at least float32, with the head's bias where it has one.

    `tied` takes the transposed embedding for the head's kernel; `soft_cap` c makes them
    c * tanh(logits / c).
    """
    head = params["embed"]["embedding"].T if tied else params["head"]["kernel"]
    dtype = at_least_f32(x.dtype)
    # Both gradients before anything else: the logits' is large and is not kept for later.
    x, head = jax.lax.optimization_barrier((x, head.astype(x.dtype)))
    out = compat.matmul(x, head, preferred_element_type=dtype)
    if "bias" in params.get("head", {}):
        out = out + params["head"]["bias"].astype(dtype)
    out = constrain(out, "batch", "sequence", "vocab")
    return out if soft_cap is None else soft_cap * jnp.tanh(out / soft_cap)
