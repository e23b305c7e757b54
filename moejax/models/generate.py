"""Continues prompts, token by token, with a KV cache."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

from moejax.errors import UserError
from moejax.layers.row_keys import fold_in, row_keys
from moejax.models.output import Variables
from moejax.models.transformer import Transformer
from moejax.parallel.sharding import constrain


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to draw tokens.

    Attributes:
      max_new_tokens: at most so many for each prompt.
      temperature: 0 takes the likeliest token; otherwise logits are divided by it.
      top_p: draws from the smallest set of likeliest tokens whose probability reaches it
        (Holtzman et al., arXiv 1904.09751).
    """

    max_new_tokens: int = 128
    temperature: float = 0.7
    top_p: float = 0.95

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if self.temperature < 0:
            raise UserError(f"temperature={self.temperature} must be 0 or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} must be above 0 and at most 1")


def generate(
    model: Transformer,
    variables: Variables,
    prompts: Sequence[Int[ArrayLike, " _"]],
    sampling: Sampling,
    *,
    seed: int = 0,
    stop_id: int | None = None,
    intervention: dict[str, Any] | None = None,
) -> list[np.ndarray]:
    """The new ids of every prompt, cut before the first `stop_id`.

    Args:
      prompts: 1-D arrays of token ids, each of at least one token, of any lengths.
      seed: with the prompt's index and the token's index it decides every draw, so a
        continuation does not depend on which other prompts are in the batch.
      intervention: as for `model.apply`; what is per sequence is per prompt.
    """
    if not prompts or any(len(p) == 0 for p in prompts):
        raise UserError("sampling needs at least one prompt, and every prompt at least one token")
    tokens, lengths = padded(prompts)
    if tokens.min() < 0 or tokens.max() >= model.vocab_size:
        raise UserError(
            f"a prompt has ids from {tokens.min()} to {tokens.max()}; the model knows 0 to "
            f"{model.vocab_size - 1}: use the tokenizer it was trained with"
        )
    key = jax.random.key(seed)
    new = np.asarray(_generate(model, sampling, variables, tokens, lengths, key, intervention))
    return [until(row, stop_id) for row in new]


def padded(texts: Sequence[Int[ArrayLike, " _"]]) -> tuple[np.ndarray, np.ndarray]:
    """(ids `[B, longest]`, zeros behind each text; lengths `[B]`)."""
    lengths = np.array([len(text) for text in texts])
    tokens = np.zeros((len(texts), lengths.max()), np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    return tokens, lengths


def until(row: np.ndarray, stop_id: int | None) -> np.ndarray:
    """The ids before the first `stop_id`."""
    return row[: np.argmax(row == stop_id)] if (row == stop_id).any() else row


@functools.partial(jax.jit, static_argnums=(0, 1))
def _generate(model, sampling, variables, tokens, lengths, key, intervention):
    batch, longest = tokens.shape
    cache_length = longest + sampling.max_new_tokens
    keys = row_keys(key, batch)

    def forward(cache, tokens, positions, mask):
        out = model.apply(
            variables | {"cache": cache},
            tokens,
            segment_ids=mask.astype(jnp.int32),
            positions=positions,
            intervention=intervention,
            cache_length=cache_length,
        )
        return out.logits, out.cache

    def draw(logits: Float[Array, "B V"], index: Array) -> Array:
        if sampling.temperature == 0:
            return jnp.argmax(logits, axis=-1)
        now = fold_in(keys, index)
        kept = _nucleus(logits / sampling.temperature, sampling.top_p)
        return jax.vmap(jax.random.categorical)(now, kept)

    positions = jnp.broadcast_to(jnp.arange(longest), tokens.shape)
    cache = model.init_cache(variables, batch, cache_length)
    logits, cache = forward(cache, tokens, positions, positions < lengths[:, None])
    first = draw(logits[jnp.arange(batch), lengths - 1], jnp.int32(0))

    def step(carry, index):
        token, cache = carry
        position = (lengths + index)[:, None]
        logits, cache = forward(cache, token[:, None], position, jnp.ones((batch, 1), bool))
        new = draw(logits[:, 0], index + 1)
        return (new, cache), new

    _, rest = jax.lax.scan(step, (first, cache), jnp.arange(sampling.max_new_tokens - 1))
    new = jnp.concatenate([first[:, None], rest.T], axis=1)
    return constrain(new, "whole", "whole")  # every process reads all of it


def _nucleus(logits: Float[Array, "B V"], top_p: float) -> Float[Array, "B V"]:
    """-inf for every token outside the smallest set that reaches probability `top_p`."""
    if top_p == 1.0:
        return logits
    order = jnp.argsort(-logits, axis=-1)
    probs = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs  # probability of all likelier tokens
    keep = jnp.take_along_axis(before < top_p, jnp.argsort(order, axis=-1), axis=-1)
    return jnp.where(keep, logits, -jnp.inf)
