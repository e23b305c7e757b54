"""The load-balance loss E * sum_i f_i P_i over four ranges of tokens, each a named class.

Fedus et al., "Switch Transformers", arXiv 2101.03961, equation 4. f_i is the share of all
choices that went to expert i (they sum to 1 over the experts) and P_i the mean router
probability, so perfect balance gives 1. (Code that lets f sum to k, such as Hugging Face's,
reports k times as much.) f carries no gradient. Padding counts in neither.

Which tokens f is taken over matters: Qiu et al., arXiv 2501.11873, show that a small range
forces every sequence to use every expert.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.balance.rule import Rule
from moejax.errors import UserError
from moejax.types import Context, Routing, Stats, Term, Terms


def choices(routing: Routing) -> Float[Array, "T E"]:
    """How often token t chose expert e (0 or 1); empty slots count nothing. No gradient."""
    num_experts = routing.probs.shape[-1]
    picked = routing.experts[:, :, None] == jnp.arange(num_experts)
    return jax.lax.stop_gradient(picked.sum(axis=1).astype(routing.probs.dtype))


def _share(counts: Float[Array, "... E"]) -> Float[Array, "... E"]:
    total = counts.sum(axis=-1, keepdims=True)
    return counts / jnp.where(total > 0, total, 1)


def _term(share: Float[Array, "... E"], probs: Float[Array, "... X E"], mask: Array) -> Term:
    """(sum over tokens of E * f . p, number of tokens) with f of the token's own range."""
    per_token = probs.shape[-1] * jnp.einsum("...e,...xe->...x", share, probs)
    return jnp.where(mask, per_token, 0).sum(), mask.sum().astype(probs.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SequenceLoadBalance(Rule):
    """f over each sequence (row of the batch): DeepSeek-V3's complementary loss."""

    weight: float

    name: ClassVar[str] = "balance_sequence"

    def terms(self, routing: Routing, context: Context, state: dict[str, Array]) -> Terms:
        mask = context.token_mask  # [B, S]
        probs = routing.probs.reshape(*mask.shape, -1)
        counts = choices(routing).reshape(*mask.shape, -1).sum(axis=1)  # [B, E]
        return {self.name: _term(_share(counts), probs, mask)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardLoadBalance(Rule):
    """f over the tokens of one data shard of one microbatch: what most trainers do.

    The result depends on the mesh and on the number of microbatches; prefer `TwoPassLoadBalance`
    where that matters. Shards are equal runs of whole sequences.
    """

    weight: float
    num_shards: int = 1

    name: ClassVar[str] = "balance_shard"
    mesh_dependent: ClassVar[bool] = True

    def terms(self, routing: Routing, context: Context, state: dict[str, Array]) -> Terms:
        num_experts = routing.probs.shape[-1]
        if context.token_mask.shape[0] % self.num_shards:
            raise UserError(
                f"ShardLoadBalance.num_shards={self.num_shards} does not divide the "
                f"{context.token_mask.shape[0]} sequences of a microbatch"
            )
        mask = context.token_mask.reshape(self.num_shards, -1)  # [P, T / P]
        probs = routing.probs.reshape(*mask.shape, num_experts)
        counts = choices(routing).reshape(*mask.shape, num_experts).sum(axis=1)
        return {self.name: _term(_share(counts), probs, mask)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoPassLoadBalance(Rule):
    """f over the global batch, exactly, whatever the microbatches and the mesh.

    With several microbatches the step first runs them forward without gradient to count the
    choices (`context.loads`); with one, the choices of this very pass are the global ones.
    """

    weight: float

    name: ClassVar[str] = "balance_global"
    loads: ClassVar[Literal["two_pass"] | None] = "two_pass"

    def terms(self, routing: Routing, context: Context, state: dict[str, Array]) -> Terms:
        share = context.loads
        if share is None:
            share = _share(choices(routing).sum(axis=0))
        mask = context.token_mask.reshape(-1)
        return {self.name: _term(share.astype(routing.probs.dtype), routing.probs, mask)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaggedLoadBalance(Rule):
    """f over the previous step's global batch: one pass, approximate.

    The first step sees a uniform f, which gives every expert the same push.
    """

    weight: float

    name: ClassVar[str] = "balance_lagged"

    def state(self, num_experts: int) -> dict[str, Array]:
        return {"previous_share": jnp.full((num_experts,), 1.0 / num_experts, jnp.float32)}

    def terms(self, routing: Routing, context: Context, state: dict[str, Array]) -> Terms:
        mask = context.token_mask.reshape(-1)
        share = jax.lax.stop_gradient(state["previous_share"]).astype(routing.probs.dtype)
        return {self.name: _term(share, routing.probs, mask)}

    def update(self, state: dict[str, Array], stats: Stats) -> dict[str, Array]:
        load = stats["load"].astype(state["previous_share"].dtype)
        share = jnp.where(load.sum() > 0, _share(load), state["previous_share"])
        return {"previous_share": share}


def example() -> tuple[Rule, ...]:
    """A small instance of each, for the contract tests."""
    kinds = (SequenceLoadBalance, ShardLoadBalance, TwoPassLoadBalance, LaggedLoadBalance)
    return tuple(kind(weight=1e-2) for kind in kinds)
