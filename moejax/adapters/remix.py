"""ReMix: adapters of equal weight, chosen by a router that learns by trial (policy gradient).

"ReMix", arXiv 2603.10160. Learned weights collapse onto one adapter; here the k that are chosen
weigh the same, so the effective support size is k exactly. Which k is drawn in training, without
replacement, and `objectives/remix.py` teaches the router from the losses of several draws; without
a key it is the k most probable.
"""

from __future__ import annotations

import dataclasses
import zlib

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.adapters.mixed import MixedLinear
from moejax.layers.mixing.bank import LoRABank
from moejax.layers.mixing.mixture import Mixture
from moejax.layers.mixing.router import Router, check_k, is_chosen
from moejax.layers.row_keys import fold_in
from moejax.types import Context


class PlackettLuce(Router):
    """k adapters of weight k^-power, drawn one after another in proportion to their probability.

    The paper's weights are 2 / (k rank) and 2 / sqrt(k rank): with alpha = 2, the bank's scale
    gives the part that depends on the rank (`LoRABank`, `RsLoRABank`), and power 1 or 1/2 that
    of k. The router reads its input without a gradient: what it learns from the losses reaches
    neither adapters nor layers below. The gate begins at zero, every choice equally probable.

    Attributes:
      k: adapters per token.
      power: see above.
    """

    gate_init: nn.initializers.Initializer = nn.initializers.zeros
    k: int = 2
    power: float = 1.0

    @nn.compact
    def __call__(self, x: Float[Array, "B S F"], context: Context) -> Mixture:
        check_k(self.k, self.num_adapters)
        logits = self.gate()(jax.lax.stop_gradient(x), context)
        scores = jax.lax.stop_gradient(logits)
        if context.key is not None:  # adding Gumbel noise makes the k largest such a draw, in order
            keys = fold_in(context.key, zlib.crc32("/".join(self.path).encode()))
            draw = lambda key: jax.random.gumbel(key, logits.shape[1:], logits.dtype)
            scores = scores + jax.vmap(draw)(keys)
        _, chosen = jax.lax.top_k(scores, self.k)
        # A constant does not show that there are no logits (a task that is not known).
        unknown = jnp.isnan(logits).any(axis=-1, keepdims=True)
        constant = jnp.where(unknown, jnp.nan, jnp.asarray(self.k**-self.power, logits.dtype))
        return Mixture(
            weights=jnp.where(is_chosen(chosen, self.num_adapters), constant, 0),
            chosen=chosen,
            log_prob=None if context.key is None else log_probability(logits, chosen),
        )


def log_probability(
    logits: Float[Array, "B s E"], chosen: Int[Array, "B s k"]
) -> Float[Array, "B s"]:
    """Of drawing `chosen` in this order without replacement (Plackett-Luce)."""
    total = jnp.zeros(logits.shape[:-1], logits.dtype)
    remaining = logits
    for j in range(chosen.shape[-1]):
        own = chosen[..., j, None]
        score = jnp.take_along_axis(logits, own, axis=-1)[..., 0]
        total = total + score - jax.nn.logsumexp(remaining, axis=-1)
        remaining = jnp.where(jnp.arange(logits.shape[-1]) == own, -jnp.inf, remaining)
    return total


class ReMix(MixedLinear):
    """`MixedLinear` with `PlackettLuce`.

    The paper: 8 adapters of rank 8 on the MLPs' projections, trained with `objectives.remix.RLOO`.
    """

    router: nn.Module = dataclasses.field(default_factory=PlackettLuce)
    bank: nn.Module = dataclasses.field(default_factory=lambda: LoRABank(alpha=2.0))


def example() -> ReMix:
    """A small instance, for the contract tests."""
    return ReMix(bank=LoRABank(num_adapters=4, rank=2, alpha=2.0))
