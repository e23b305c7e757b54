"""Continues prompts, token by token, with a KV cache."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

from moejax.errors import UserError
from moejax.layers.row_keys import fold_in, numbered_keys
from moejax.models.output import Variables
from moejax.models.transformer import Transformer
from moejax.parallel.sharding import constrain

_COLDEST = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to draw tokens.

    Attributes:
      max_new_tokens: at most so many for each prompt.
      temperature: 0 takes the likeliest token; otherwise logits are divided by it. What lies
        between 0 and 1e-6 is refused: float32 may not hold the quotients.
      top_p: draws from the smallest set of likeliest tokens whose probability reaches it
        (Holtzman et al., arXiv 1904.09751).
    """

    max_new_tokens: int = 128
    temperature: float = 0.7
    top_p: float = 0.95

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature={self.temperature} must be 0 or more, and finite")
        if 0 < self.temperature < _COLDEST:
            raise UserError(
                f"temperature={self.temperature} is too small to divide logits by: give 0, which "
                f"takes the likeliest token, or {_COLDEST} or more"
            )
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} must be above 0 and at most 1")


def generate(
    model: Transformer,
    variables: Variables,
    prompts: Sequence[Int[ArrayLike, " _"]],
    sampling: Sampling,
    *,
    seed: int = 0,
    numbers: Sequence[int] | None = None,
    stop_id: int | None = None,
    intervention: dict[str, Any] | None = None,
) -> list[np.ndarray]:
    """The new ids of every prompt, cut before the first `stop_id`.

    Args:
      prompts: 1-D arrays of token ids, each of at least one token, of any lengths.
      seed: with the prompt's number and the token's index it decides every draw, so a
        continuation does not depend on which other prompts are in the batch. The exception is a
        model with `LongRopeScaling`: it goes by the slots of the cache, of which there are as many
        as the longest prompt's tokens and `max_new_tokens` together, and where these are more than
        its `original_context`, every prompt gets the long factors.
      numbers: of the prompts, in [0, 2**31); None is 0, 1, ... What is drawn for one of several
        batches is only new under numbers of its own.
      intervention: as for `model.apply`; what is per sequence is per prompt.

    Raises UserError where there is no likeliest token, because the logits hold NaN or infinity.
    """
    if not prompts or any(len(p) == 0 for p in prompts):
        raise UserError("sampling needs at least one prompt, and every prompt at least one token")
    tokens, lengths = padded(prompts)
    if tokens.min() < 0 or tokens.max() >= model.vocab_size:
        raise UserError(
            f"a prompt has ids from {tokens.min()} to {tokens.max()}; the model knows 0 to "
            f"{model.vocab_size - 1}: use the tokenizer it was trained with"
        )
    numbers = jnp.asarray(range(len(prompts)) if numbers is None else numbers, jnp.int32)
    keys = numbered_keys(jax.random.key(seed), numbers)
    new, usable = _generate(model, sampling, variables, tokens, lengths, keys, intervention)
    found = [until(row, stop_id) for row in np.asarray(new)]
    for index, (ids, row) in enumerate(zip(found, np.asarray(usable), strict=True)):
        # What stops a text is drawn too; what was drawn behind it is not used.
        if not row[: len(ids) + 1].all():
            raise UserError(
                f"prompt {index + 1} of {len(prompts)} cannot be continued: the model's logits for "
                f"its new token {int(np.argmin(row)) + 1} are NaN or infinite; look for NaN in the "
                "weights, or compute in another model.dtype"
            )
    return found


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
def _generate(model, sampling, variables, tokens, lengths, keys, intervention):
    batch, longest = tokens.shape
    cache_length = longest + sampling.max_new_tokens

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

    def draw(logits: Float[Array, "B V"], index: Array) -> tuple[Array, Array]:
        """(tokens, whether the logits decide them); -inf is a token that is never drawn."""
        usable = jnp.isfinite(logits.max(axis=-1))
        if sampling.temperature == 0:
            return jnp.argmax(logits, axis=-1), usable
        now = fold_in(keys, index)
        kept = _nucleus(logits / sampling.temperature, sampling.top_p)
        return jax.vmap(jax.random.categorical)(now, kept), usable

    positions = jnp.broadcast_to(jnp.arange(longest), tokens.shape)
    cache = model.init_cache(variables, batch, cache_length)
    logits, cache = forward(cache, tokens, positions, positions < lengths[:, None])
    first, first_usable = draw(logits[jnp.arange(batch), lengths - 1], jnp.int32(0))

    def step(carry, index):
        token, cache = carry
        position = (lengths + index)[:, None]
        logits, cache = forward(cache, token[:, None], position, jnp.ones((batch, 1), bool))
        new, usable = draw(logits[:, 0], index + 1)
        return (new, cache), (new, usable)

    _, rest = jax.lax.scan(step, (first, cache), jnp.arange(sampling.max_new_tokens - 1))
    joined = lambda first, rest: jnp.concatenate([first[:, None], rest.T], axis=1)
    both = jax.tree.map(joined, (first, first_usable), rest)
    return jax.tree.map(lambda x: constrain(x, "whole", "whole"), both)  # every process reads all


def _nucleus(logits: Float[Array, "B V"], top_p: float) -> Float[Array, "B V"]:
    """-inf for every token outside the smallest set that reaches probability `top_p`."""
    if top_p == 1.0:
        return logits
    order = jnp.argsort(-logits, axis=-1)
    probs = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs  # probability of all likelier tokens
    keep = jnp.take_along_axis(before < top_p, jnp.argsort(order, axis=-1), axis=-1)
    return jnp.where(keep, logits, -jnp.inf)
