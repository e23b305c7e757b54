"""Samples within packed rows: the token before a response, and a key for a document's tokens.

A sample is known by its tokens, not by a number: so packing, shuffling and mixing need not carry
one along, and a table that belongs to other data or another tokenizer is found out. A document
that a row boundary cuts is not found.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, UInt32

from moejax.types import Batch

# Odd constants: two for the positions, two for the tokens, one pair per half of a key.
_HALVES = ((0x9E3779B1, 0x85EBCA77), (0xC2B2AE3D, 0x27D4EB2F))


def before_responses(batch: Batch) -> Bool[Array, "B S"]:
    """True at each segment's first position whose target counts in the loss.

    With prompts and responses that is the last token of the prompt: where the answer is decided.
    """
    mask = jnp.asarray(batch.loss_mask)
    scored = jnp.cumsum(mask, axis=1) - mask  # before this position, in the row
    begin = jnp.arange(mask.shape[1]) - jnp.asarray(batch.positions)
    at_begin = jnp.take_along_axis(scored, jnp.maximum(begin, 0), axis=1)
    return mask & (scored == at_begin)


def document_keys(batch: Batch, *, salt: Array | int = 0) -> UInt32[Array, "2 B S"]:
    """At each position two hashes of all tokens of its segment, in order; 0 in padding."""
    tokens, positions, segments = (
        jnp.asarray(x).astype(jnp.uint32)
        for x in (batch.tokens, batch.positions, batch.segment_ids)
    )
    num_rows, length = tokens.shape
    owner = jnp.arange(num_rows, dtype=jnp.uint32)[:, None] * (length + 1) + segments
    keys = []
    for position_factor, token_factor in _HALVES:
        word = _mixed(tokens * jnp.uint32(token_factor) + jnp.asarray(salt).astype(jnp.uint32))
        word = _mixed(word ^ _mixed(positions * jnp.uint32(position_factor) + jnp.uint32(1)))
        total = jax.ops.segment_sum(
            word.reshape(-1), owner.reshape(-1), num_segments=num_rows * (length + 1)
        )
        keys.append(jnp.where(segments > 0, total[owner], 0))
    return jnp.stack(keys)


def _mixed(word: Array) -> Array:
    """A bijection of 32-bit words that spreads every bit (the finaliser of MurmurHash3)."""
    word = (word ^ (word >> 16)) * jnp.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * jnp.uint32(0xC2B2AE35)
    return word ^ (word >> 16)
