"""What a router of adapters decides, and what is reported of it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.layers.reports import Report
from moejax.types import Context, Term, Terms, pytree

SUPPORT_SIZE = "support_size"


@pytree
class Mixture:
    """Weights of E adapters, 0 for one that has no part. In at least float32.

    s is S where tokens have weights of their own, and 1 where all of a row share them.

    Attributes:
      weights: `[B, s, E]`.
      chosen: the adapters of weight other than 0, where a token has a fixed number of them.
      terms: (sum, count) pairs that enter the loss, with the router's `loss_weights`.
      log_prob: of what was drawn, where something was.
    """

    weights: Float[Array, "B s E"]
    chosen: Int[Array, "B s k"] | None = None
    terms: Terms = dataclasses.field(default_factory=dict)
    log_prob: Float[Array, "B s"] | None = None

    def report(self, context: Context) -> Report:
        """Its terms, the effective support size of its weights, and what was drawn per row."""
        mask = context.token_mask
        size = effective_support_size(jax.lax.stop_gradient(self.weights))
        return Report(
            terms=self.terms,
            measures={SUPPORT_SIZE: masked(size, mask)},
            log_prob=None if self.log_prob is None else _by_row(self.log_prob, mask),
        )


def effective_support_size(weights: Float[Array, "B s E"]) -> Float[Array, "B s"]:
    """(sum |w|)^2 / sum w^2: k for k equal weights; 0 where all are 0 (arXiv 2603.10160)."""
    square = jnp.square(weights).sum(-1)
    total = jnp.square(jnp.abs(weights).sum(-1))
    return jnp.where(square > 0, total / jnp.where(square > 0, square, 1), 0)


def masked(values: Float[Array, "B s"], mask: Bool[Array, "B S"]) -> Term:
    """(sum over real tokens, their number)."""
    values = jnp.broadcast_to(values, mask.shape)
    return jnp.where(mask, values, 0).sum(), mask.sum().astype(values.dtype)


def row_balance(
    shares: Float[Array, "B s E"], probs: Float[Array, "B s E"], mask: Bool[Array, "B S"]
) -> Term:
    """(sum over real tokens of E sum_e f_e P_e of the token's row, their number).

    f and P are the means of `shares` and `probs` over the row's real tokens. Published mixtures
    take them over a batch, and so get another loss from other microbatches and other meshes.
    """
    count = mask.sum(axis=1).astype(probs.dtype)  # [B]

    def mean(x: Array) -> Float[Array, "B E"]:
        own = jnp.where(mask[..., None], jnp.broadcast_to(x, (*mask.shape, x.shape[-1])), 0)
        return own.sum(axis=1) / jnp.maximum(count, 1)[:, None]

    balance = probs.shape[-1] * (mean(shares) * mean(probs)).sum(-1)
    return (count * balance).sum(), count.sum()


def _by_row(log_prob: Float[Array, "B s"], mask: Bool[Array, "B S"]) -> Float[Array, " B"]:
    """Of all draws of a row; one that all tokens share counts once, if there is a token."""
    if log_prob.shape[1] != mask.shape[1]:
        mask = mask.any(axis=1, keepdims=True)
    return jnp.where(mask, log_prob, 0).sum(axis=1)
