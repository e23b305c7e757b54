"""Next-token prediction with the model's auxiliary terms."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int

from moejax.errors import UserError
from moejax.models.output import Output
from moejax.models.transformer import Transformer
from moejax.objectives.objective import Result
from moejax.types import Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextToken:
    """Cross-entropy in nats per target token, plus `z_weight` * mean(logsumexp(logits)^2).

    The z term keeps the head's logits from drifting (PaLM, arXiv 2204.02311, section 5).
    """

    z_weight: float = 0.0

    def weights(self, model: Transformer) -> dict[str, float]:
        """{term: factor in the total loss}."""
        own = {"lm": 1.0} | ({"head_z": self.z_weight} if self.z_weight else {})
        return own | model.loss_weights()

    def __call__(
        self,
        model: Transformer,
        variables: Any,
        batch: Batch,
        *,
        token_bytes: Int[ArrayLike, "V"],
        step: Array | int = 0,
        key: Array | None = None,
        loads: Any = None,
    ) -> Result:
        """Terms of one batch. `token_bytes[v]` is the number of UTF-8 bytes of token v."""
        out = forward(model, variables, batch, step=step, key=key, loads=loads)
        return self.result(out, batch, token_bytes)

    def result(self, out: Output, batch: Batch, token_bytes: Int[ArrayLike, "V"]) -> Result:
        """Terms of what the model made of the batch."""
        mask = batch.loss_mask
        log_normaliser = jax.nn.logsumexp(out.logits, axis=-1)
        nll = jnp.where(mask, log_normaliser - _logit_of(out.logits, batch.targets), 0).sum()
        count = mask.sum().astype(nll.dtype)
        terms = {"lm": (nll, count)} | out.terms
        if self.z_weight:
            terms["head_z"] = (jnp.where(mask, jnp.square(log_normaliser), 0).sum(), count)
        num_bytes = jnp.where(mask, target_bytes(batch, token_bytes), 0).sum()
        measures = {
            "bits_per_byte": (
                jax.lax.stop_gradient(nll) / math.log(2),
                num_bytes.astype(nll.dtype),
            )
        }
        return Result(terms=terms, measures=measures | out.measures, stats=out.stats)


def forward(
    model: Transformer,
    variables: Any,
    batch: Batch,
    *,
    record: bool = False,
    uses_log_prob: bool = False,
    **options: Any,
) -> Output:
    """The model on a batch; `options` as for `model.apply`.

    Raises UserError where adapters are drawn (which takes a key) and the objective does not say
    that it uses the draws' log-probability: nothing else teaches the routers that draw them.
    """
    out = model.apply(
        variables,
        batch.tokens,
        segment_ids=batch.segment_ids,
        positions=batch.positions,
        task_ids=batch.sources,
        record=record,
        **options,
    )
    if out.log_prob is not None and not uses_log_prob:
        raise UserError(
            "the model's adapters are drawn by routers (PlackettLuce, of ReMix) which learn from "
            "the draws' log-probability alone, and this objective does not use it: set objective "
            "to moejax.objectives.remix.RLOO, or give the adapter another router"
        )
    return out


def token_nll(out: Output, batch: Batch) -> Float[Array, "B S"]:
    """Nats of every target, padding included."""
    return jax.nn.logsumexp(out.logits, axis=-1) - _logit_of(out.logits, batch.targets)


def target_bytes(batch: Batch, token_bytes: Int[ArrayLike, "V"]) -> Int[Array, "B S"]:
    """UTF-8 bytes of every target, padding included; 0 for an id that is no token's."""
    ids = _none_from_the_end(batch.targets, len(token_bytes))
    return jnp.take(jnp.asarray(token_bytes), ids, mode="fill", fill_value=0)


def _logit_of(logits: Float[Array, "B S V"], ids: Int[ArrayLike, "B S"]) -> Float[Array, "B S"]:
    """NaN for an id that is no token's."""
    ids = _none_from_the_end(ids, logits.shape[-1])
    return jnp.take_along_axis(logits, ids[..., None], axis=-1, mode="fill")[..., 0]


def _none_from_the_end(ids: Int[ArrayLike, "B S"], size: int) -> Int[Array, "B S"]:
    """`ids`, but `size` for one below 0, which indexing would take for one from the end."""
    return jnp.where(jnp.asarray(ids) < 0, size, ids)
