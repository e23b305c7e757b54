"""Router z-loss: keeps the router's logits small.

Zoph et al., "ST-MoE", arXiv 2202.08906, equation 5: mean over tokens of logsumexp(logits)^2.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from moejax.balance.rule import Rule
from moejax.types import Context, Routing, Terms


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterZLoss(Rule):
    """logsumexp(logits)^2, mean over tokens that are not padding."""

    weight: float

    name: ClassVar[str] = "router_z"

    def terms(self, routing: Routing, context: Context, state: dict[str, Array]) -> Terms:
        mask = context.token_mask.reshape(-1)
        square = jnp.square(jax.nn.logsumexp(routing.logits, axis=-1))
        return {self.name: (jnp.where(mask, square, 0).sum(), mask.sum().astype(square.dtype))}


def example() -> RouterZLoss:
    """A small instance, for the contract tests."""
    return RouterZLoss(weight=1e-3)
