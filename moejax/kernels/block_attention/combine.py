"""Puts the parts of a query's attention together: its own block's, and those of its choices."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jax.nn import logsumexp
from jaxtyping import Float

from moejax.kernels.block_attention.attend import share
from moejax.kernels.expert_mlp.slots import Slots


def combine(
    own: Float[Array, "T dv"],
    own_lse: Float[Array, " T"],
    rows: Float[Array, "R dv"],
    rows_lse: Float[Array, " R"],
    slots: Slots,
) -> tuple[Float[Array, "T dv"], Float[Array, " T"]]:
    """(result, log-sum-exp) over all keys; the parts are weighted by exp(lse - total).

    Gathers alone, as the sum of the experts' outputs. A query without keys has 0 and -inf.
    """
    lse = jnp.where(slots.filled(), slots.from_rows(rows_lse), -jnp.inf)
    total = logsumexp(jnp.concatenate([own_lse[:, None], lse], axis=1), axis=1)
    out = slots.sum_by_token(rows, own.dtype, weights=share(lse, total[:, None]))
    return out + own * share(own_lse, total)[:, None], total
