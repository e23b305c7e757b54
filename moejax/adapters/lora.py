"""LoRA: a trained product of two thin matrices beside every frozen one.

Hu et al., arXiv 2106.09685; rank-stabilised scaling (rsLoRA), Kalajdzievski, arXiv 2312.03732.
Initialisation and names of the settings as in PEFT.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
from flax.linen import initializers
from jaxtyping import Array, Float

from moejax.errors import UserError
from moejax.kernels import mixed_precision
from moejax.layers.adapter_leaf import adapter_leaf, adapter_value
from moejax.layers.dropout import dropout
from moejax.layers.linear import Linear, is_target, set_by_owner
from moejax.types import Context

# U(-1/sqrt(in), 1/sqrt(in)): kaiming_uniform(a=sqrt(5)) of torch.
_uniform = initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class LoRA(Linear):
    """`y = x W + b + s dropout(x) A B` with `s = alpha / rank`; A `[in, rank]`, B `[rank, out]`.

    A begins uniform in +-1/sqrt(in) and B at zero.

    Attributes:
      rank: width r of the product; PEFT's `r`.
      alpha: see s; PEFT's `lora_alpha`.
      dropout: share of the entries of x that A does not see in training.
      targets: paths within the layer of the projections that get one; None for all. Set by
        whoever attaches the adapter.
    """

    rank: int = 8
    alpha: float = 8.0
    dropout: float = 0.0
    targets: tuple[str, ...] | None = set_by_owner(None)

    @property
    def scale(self) -> float:
        """s."""
        return self.alpha / self.rank

    @nn.compact
    def __call__(self, x: Float[Array, "... K"], context: Context) -> Float[Array, "... N"]:
        y = super().__call__(x, context)
        if not is_target(self):
            return y
        self._check()
        into, out_of = self.axes
        down, up = (x.shape[-1], self.rank), (self.rank, self.features)
        a = adapter_leaf(self, "a", _uniform, down, (into, None))
        b = adapter_leaf(self, "b", initializers.zeros, up, (None, out_of))
        inner = mixed_precision.matmul(dropout(x, self.dropout, context, self.path), a)
        return y + self.scale * mixed_precision.matmul(inner, b)

    def matrix(self, dtype: Any) -> Float[Array, "K N"]:
        """W + s A B."""
        base = super().matrix(dtype)
        if not is_target(self):
            return base
        a, b = (adapter_value(self, name).astype(dtype) for name in ("a", "b"))
        return base + self.scale * mixed_precision.matmul(a, b)

    def _check(self) -> None:
        if self.rank < 1:
            raise UserError(f"adapter.linear.rank={self.rank} must be at least 1")
        if not 0 <= self.dropout < 1:
            raise UserError(f"adapter.linear.dropout={self.dropout} must be in [0, 1)")


class RsLoRA(LoRA):
    """LoRA with `s = alpha / sqrt(rank)`, under which larger ranks do not learn more slowly."""

    @property
    def scale(self) -> float:
        """s."""
        return self.alpha / math.sqrt(self.rank)
