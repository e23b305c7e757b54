"""Banks of LoRA adapters: what a mixture adds to a projection.

Computed over all adapters at once: x [A_1 ... A_E], the weights, and [B_1; ...; B_E] are two plain
matrix products. The weights are applied in rank space, so that nothing larger than tokens x E x
rank exists, and adapters of weight 0 cost little where E rank is small beside the projection. With
many adapters for each chosen one, rows are sorted by adapter instead (`ragged.py`).
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import initializers
from jaxtyping import Array, Float

from moejax.errors import UserError
from moejax.kernels import mixed_precision
from moejax.layers.adapter_leaf import adapter_leaf
from moejax.layers.dropout import dropout
from moejax.layers.linear import set_by_owner
from moejax.layers.mixing.mixture import Mixture
from moejax.layers.mixing.ragged import pays, ragged_delta
from moejax.types import Context

# Adapters are the batch axis: each is drawn like one of its own.
uniform_each = initializers.variance_scaling(1 / 3, "fan_in", "uniform", batch_axis=(0,))


class LoRABank(nn.Module):
    """`delta = s sum_e w_e x A_e B_e`, s = alpha / rank; A `[E, in, rank]`, B `[E, rank, out]`.

    Fresh, every A is uniform in +-1/sqrt(in) and every B zero.

    Attributes:
      num_adapters: E.
      rank: width r of each product.
      alpha: see s.
      dropout: share of the entries of x that the A's do not see in training.
      d_in, d_out: widths of the projection. Set by the owner.
      axes: logical names of the two. Set by the owner.
    """

    num_adapters: int = 8
    rank: int = 8
    alpha: float = 8.0
    dropout: float = 0.0
    d_in: int = set_by_owner(0)
    d_out: int = set_by_owner(0)
    axes: tuple[str | None, str | None] = set_by_owner((None, None))

    def setup(self) -> None:
        check_bank(self)
        (into, out_of), e = self.axes, self.num_adapters
        shapes = (e, self.d_in, self.rank), (e, self.rank, self.d_out)
        self.a = adapter_leaf(self, "a", uniform_each, shapes[0], (None, into, None))
        self.b = adapter_leaf(self, "b", initializers.zeros, shapes[1], (None, None, out_of))

    @property
    def scale(self) -> float:
        """s."""
        return self.alpha / self.rank

    def seen_by_router(
        self, x: Float[Array, "B S K"], inner: Float[Array, "B S *inner"]
    ) -> Float[Array, "B S F"]:
        """What the router gets: x."""
        del inner
        return x

    def down(self, x: Float[Array, "B S K"], context: Context) -> Float[Array, "B S E r"]:
        """x A_e for every adapter."""
        a = self.a.transpose(1, 0, 2).reshape(self.d_in, -1)
        inner = mixed_precision.matmul(dropout(x, self.dropout, context, self.path), a)
        return inner.reshape(*x.shape[:-1], self.num_adapters, self.rank)

    def up(
        self, inner: Float[Array, "B S E r"], weights: Float[Array, "B s E"]
    ) -> Float[Array, "B S N"]:
        """s sum_e w_e inner_e B_e."""
        b = self.b.reshape(-1, self.d_out)
        # What is kept for the gradients is `inner` and the weights, not their product.
        product = jax.checkpoint(_gated_product, prevent_cse=False)
        return self.scale * product(inner, weights.astype(inner.dtype), b)

    def delta(
        self,
        x: Float[Array, "B S K"],
        inner: Float[Array, "B S E r"],
        mixture: Mixture,
        context: Context,
    ) -> Float[Array, "B S N"]:
        """What is added to the projection of x: `up(inner, weights)`, or the same sum by rows
        sorted by adapter where that is faster (`ragged.pays`; `inner` is then not computed).
        """
        if mixture.chosen is None or not pays(self.num_adapters, mixture.chosen.shape[-1]):
            return self.up(inner, mixture.weights)
        shape = (*x.shape[:2], mixture.chosen.shape[-1])
        own = jnp.take_along_axis(mixture.weights, mixture.chosen, axis=-1)
        by_token = lambda y: jnp.broadcast_to(y, shape).reshape(-1, shape[-1])
        rows = dropout(x, self.dropout, context, self.path).reshape(-1, self.d_in)
        a, b = self.a.astype(x.dtype), self.b.astype(x.dtype)
        y = ragged_delta(rows, a, b, by_token(mixture.chosen), by_token(own))
        return self.scale * y.reshape(*x.shape[:2], -1)

    def merged(self, weights: Float[Array, " E"]) -> Float[Array, "K N"]:
        """The one matrix that weights which all tokens share stand for."""
        gated = self.b * (self.scale * weights)[:, None, None]
        return mixed_precision.matmul(
            self.a.transpose(1, 0, 2).reshape(self.d_in, -1), gated.reshape(-1, self.d_out)
        )


def _gated_product(inner: Array, weights: Array, b: Array) -> Array:
    gated = inner * weights[..., None]
    return mixed_precision.matmul(gated.reshape(*inner.shape[:2], -1), b)


class RsLoRABank(LoRABank):
    """`LoRABank` with s = alpha / sqrt(rank) (arXiv 2312.03732)."""

    @property
    def scale(self) -> float:
        """s."""
        return self.alpha / math.sqrt(self.rank)


def check_bank(bank: nn.Module) -> None:
    """Raises UserError for settings that no bank can have."""
    for name in ("num_adapters", "rank"):
        if getattr(bank, name) < 1:
            raise UserError(f"bank.{name}={getattr(bank, name)} must be at least 1")
    if not 0 <= bank.dropout < 1:
        raise UserError(f"bank.dropout={bank.dropout} must be in [0, 1)")
