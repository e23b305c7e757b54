"""From token ids to embeddings, and from the last layer's output to logits."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int

from moejax.kernels import mixed_precision
from moejax.models.output import Variables
from moejax.parallel.sharding import constrain
from moejax.types import at_least_f32


def embedded(
    params: Variables, tokens: Int[ArrayLike, "B S"], *, dtype: Any
) -> Float[Array, "B S D"]:
    """The embeddings of the ids; NaN for one below 0 or of V or more, never another token's."""
    return _rows(jnp.dtype(dtype), params["embed"]["embedding"], jnp.asarray(tokens))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rows(dtype: Any, embedding: Array, tokens: Array) -> Array:
    table = constrain(embedding.astype(dtype), "vocab", "whole")
    return table.at[tokens].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


def _rows_fwd(dtype, embedding, tokens):
    empty = jnp.zeros((0, embedding.shape[0]), embedding.dtype)  # its length and dtype
    return _rows(dtype, embedding, tokens), (empty, tokens)


def _rows_bwd(dtype, residuals, gradient):
    # In bfloat16 the sum over a token's occurrences would stop growing at a few hundred of them.
    del dtype
    empty, tokens = residuals
    wide = at_least_f32(empty.dtype)
    total = jnp.zeros((empty.shape[1], gradient.shape[-1]), wide)
    add = total.at[tokens].add
    total = add(gradient.astype(wide), mode="drop", wrap_negative_indices=False)
    return constrain(total, "vocab", "whole").astype(empty.dtype), None


_rows.defvjp(_rows_fwd, _rows_bwd)


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
    x, head = jax.lax.optimization_barrier((x, head))
    out = mixed_precision.matmul(x, head, preferred_element_type=dtype)
    if "bias" in params.get("head", {}):
        out = out + params["head"]["bias"].astype(dtype)
    out = constrain(out, "batch", "sequence", "vocab")
    return out if soft_cap is None else soft_cap * jnp.tanh(out / soft_cap)
