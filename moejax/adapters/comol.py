"""CoMoL: adapters that differ only in a small core between one pair of thin matrices.

"Core-space mixture of LoRA", arXiv 2603.00573. Where ordinary mixtures hold E pairs A_e, B_e, this
one holds one pair and E cores `[rank, rank]`, and its router reads x A instead of x.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import initializers
from jaxtyping import Array, Float

from moejax.adapters.mixed import MixedLinear
from moejax.kernels import mixed_precision
from moejax.layers.adapter_leaf import adapter_leaf
from moejax.layers.dropout import dropout
from moejax.layers.linear import set_by_owner
from moejax.layers.mixing.bank import check_bank, uniform_each
from moejax.layers.mixing.mixture import Mixture
from moejax.layers.mixing.router import Softmax, uniform
from moejax.types import Context


class CoreBank(nn.Module):
    """`delta = s x A (sum_e w_e M_e) B`, s = alpha / rank; A `[in, r]`, M `[E, r, r]`.

    Computed as the product of x A, weighted E times, with the stacked cores: no matrix per token.
    Fresh, A is uniform in +-1/sqrt(in), every core in +-1/sqrt(rank), and B zero. The authors' code
    drops entries of the merged core too; here only entries of x.

    Attributes:
      num_adapters: E.
      rank: r. alpha: see s. dropout: share of the entries of x that A does not see in training.
      d_in, d_out, axes: set by the owner, as in `LoRABank`.
    """

    num_adapters: int = 8
    rank: int = 16
    alpha: float = 16.0
    dropout: float = 0.0
    d_in: int = set_by_owner(0)
    d_out: int = set_by_owner(0)
    axes: tuple[str | None, str | None] = set_by_owner((None, None))

    def setup(self) -> None:
        check_bank(self)
        (into, out_of), r = self.axes, self.rank
        cores = (self.num_adapters, r, r)
        self.a = adapter_leaf(self, "a", uniform, (self.d_in, r), (into, None))
        self.cores = adapter_leaf(self, "cores", uniform_each, cores, (None, None, None))
        self.b = adapter_leaf(self, "b", initializers.zeros, (r, self.d_out), (None, out_of))

    def seen_by_router(
        self, x: Float[Array, "B S K"], inner: Float[Array, "B S r"]
    ) -> Float[Array, "B S F"]:
        """What the router gets: x A."""
        del x
        return inner

    def down(self, x: Float[Array, "B S K"], context: Context) -> Float[Array, "B S r"]:
        """x A."""
        return mixed_precision.matmul(dropout(x, self.dropout, context, self.path), self.a)

    def up(
        self, inner: Float[Array, "B S r"], weights: Float[Array, "B s E"]
    ) -> Float[Array, "B S N"]:
        """s inner (sum_e w_e M_e) B."""
        cores = self.cores.reshape(-1, self.rank)
        mix = jax.checkpoint(_mixed, prevent_cse=False)  # or x A would be kept E times
        mixed = mix(inner, weights.astype(inner.dtype), cores)
        return (self.alpha / self.rank) * mixed_precision.matmul(mixed, self.b)

    def delta(
        self,
        x: Float[Array, "B S K"],
        inner: Float[Array, "B S r"],
        mixture: Mixture,
        context: Context,
    ) -> Float[Array, "B S N"]:
        """What is added to the projection of x."""
        del x, context
        return self.up(inner, mixture.weights)

    def merged(self, weights: Float[Array, " E"]) -> Float[Array, "K N"]:
        """The one matrix that weights which all tokens share stand for."""
        core = jnp.einsum("e,erq->rq", weights, self.cores)
        return (self.alpha / self.rank) * (self.a @ core @ self.b)


def _mixed(inner: Array, weights: Array, cores: Array) -> Array:
    gated = inner[..., None, :] * weights[..., None]  # [B, S, E, r]
    return mixed_precision.matmul(gated.reshape(*inner.shape[:2], -1), cores)


class InputRoutedCoreBank(CoreBank):
    """`CoreBank` whose router reads x itself: the paper's variant without core routing."""

    def seen_by_router(
        self, x: Float[Array, "B S K"], inner: Float[Array, "B S r"]
    ) -> Float[Array, "B S F"]:
        """What the router gets: x."""
        del inner
        return x


class CoMoL(MixedLinear):
    """`MixedLinear` of `CoreBank`, every core with its probability; no auxiliary loss.

    The paper: rank 16, 8 cores, on query, key, value, output and down projections.
    """

    router: nn.Module = dataclasses.field(default_factory=Softmax)
    bank: nn.Module = dataclasses.field(default_factory=CoreBank)


def example() -> tuple[CoMoL, ...]:
    """Small instances, for the contract tests."""
    sizes = {"num_adapters": 3, "rank": 4}
    return CoMoL(bank=CoreBank(**sizes)), CoMoL(bank=InputRoutedCoreBank(**sizes))
