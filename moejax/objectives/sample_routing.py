"""How a model routes the last token of every prompt, and which prompts it answers rightly."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, UInt32

from moejax.errors import UserError
from moejax.models.output import Variables
from moejax.models.transformer import Transformer
from moejax.objectives.lm import forward
from moejax.objectives.neighbours import MAX_SALTS
from moejax.objectives.samples import before_responses, document_keys
from moejax.objectives.traced import layer_trace
from moejax.types import Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleRouting:
    """One entry per document, in order.

    Attributes:
      routing: router probabilities over all experts at the last token of the prompt, per layer.
      successful: whether every token of the response is the model's likeliest, but for the one
        that closes it.
      keys: `samples.document_keys` with this `salt`.
      has_prompt: whether something precedes the response, beside the mark of a document's begin.
    """

    routing: Float[np.ndarray, "N L E"]
    successful: Bool[np.ndarray, "N"]
    has_prompt: Bool[np.ndarray, "N"]
    keys: UInt32[np.ndarray, "2 N"]
    salt: int


def sample_routing(
    model: Transformer,
    variables: Variables,
    batches: Callable[[], Iterable[Batch]],
    *,
    layers: tuple[int, ...],
) -> SampleRouting:
    """Reads batches of one document per row; rows without a token are left out."""

    @jax.jit
    def read(variables: Variables, batch: Batch):
        out = forward(model, variables, batch, record=True)
        # Without the token that closes a response: an untuned model need not know that it ends.
        said = batch.loss_mask & jnp.pad(batch.loss_mask[:, 1:], ((0, 0), (0, 1)))
        right = (out.logits.argmax(-1) == batch.targets) | ~said
        at = before_responses(batch)
        probs = [layer_trace(model, out.stats, layer)["probs"] for layer in layers]
        probs = jnp.stack(probs, axis=1).reshape(*batch.tokens.shape, len(layers), -1)
        place = at.argmax(axis=1)
        routing = jnp.take_along_axis(probs, place[:, None, None, None], axis=1)[:, 0]
        return routing, right.all(axis=1) & said.any(axis=1), place > 0, batch.segment_ids[:, 0] > 0

    on_device = lambda batch: jax.tree.map(jnp.asarray, batch)
    found = [jax.device_get(read(variables, on_device(batch))) for batch in batches()]
    routing, successful, has_prompt, real = (np.concatenate(x) for x in zip(*found, strict=True))
    keys, salt = _keys(batches)
    return SampleRouting(
        routing=routing[real],
        successful=successful[real],
        has_prompt=has_prompt[real],
        keys=keys[:, real],
        salt=salt,
    )


def _keys(batches: Callable[[], Iterable[Batch]]) -> tuple[np.ndarray, int]:
    """(keys `[2, rows]`, the salt with which different documents differ in the first of them)."""
    read = jax.jit(lambda batch, salt: document_keys(batch, salt=salt)[:, :, 0])
    for salt in range(MAX_SALTS):
        keys = np.concatenate([jax.device_get(read(b, salt)) for b in batches()], axis=1)
        distinct = np.unique(keys, axis=1)
        if len(np.unique(distinct[0])) == distinct.shape[1]:
            return keys, salt
    raise UserError(f"{distinct.shape[1]} documents are too many to be told apart by 32 bits")
