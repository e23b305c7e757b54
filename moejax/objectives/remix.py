"""Teaches routers that draw adapters from the losses of several draws (policy gradient).

ReMix, arXiv 2603.10160, with the leave-one-out baseline of RLOO (Kool et al., 2019). The draws of
`adapters.remix` have no derivative; their log-probability has.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int

from moejax.errors import UserError
from moejax.layers.row_keys import row_keys
from moejax.models.transformer import Transformer
from moejax.objectives.lm import NextToken, forward, token_nll
from moejax.objectives.objective import Result
from moejax.types import Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class RLOO:
    """The mean of `next_token` over M draws, and 1 / (M - 1) sum_m (L_m - mean L) log Q_m.

    L_m and log Q_m are of one row of the batch (several documents where rows are packed): the sum
    of its targets' nats under draw m, and the log-probability of all choices made for it. The
    second term, `policy`, has the gradient of what the first would be in expectation over the
    draws; as a number it says nothing and is given as 0. The measure `draw_spread` is the mean
    distance of L_m from its mean, per target.

    A row is computed M times, beside itself, so a batch needs M times the memory. Without a key
    nothing is drawn and this is `next_token`.

    Attributes:
      num_draws: M, at least 2.
      next_token: the loss.
    """

    num_draws: int = 2
    next_token: NextToken = dataclasses.field(default_factory=NextToken)

    @property
    def passes(self) -> int:
        """How often a training step computes each row."""
        return self.num_draws

    def weights(self, model: Transformer) -> dict[str, float]:
        """{term: factor in the total loss}."""
        return self.next_token.weights(model) | {"policy": 1.0}

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
        """Terms of one batch; statistics are sums over all draws."""
        if self.num_draws < 2:
            raise UserError(
                f"objective.num_draws={self.num_draws} must be at least 2: a draw is judged by the "
                "others"
            )
        if key is None:
            options = {"token_bytes": token_bytes, "step": step, "loads": loads}
            return self.next_token(model, variables, batch, **options)
        num_rows = batch.tokens.shape[0]
        rows = key if key.ndim else row_keys(key, num_rows)
        keys = jax.vmap(lambda key: row_keys(key, self.num_draws))(rows).reshape(-1)
        draws = jax.tree.map(lambda x: jnp.repeat(x, self.num_draws, axis=0), batch)
        options = {"step": step, "key": keys, "loads": loads}
        out = forward(model, variables, draws, uses_log_prob=True, **options)
        if out.log_prob is None:
            raise UserError(
                "objective RLOO teaches routers that draw, and nothing in this model does: set "
                "adapter.linear to ReMix, or take NextToken"
            )
        by_row = lambda x: x.reshape(num_rows, self.num_draws)
        losses = by_row(jnp.where(draws.loss_mask, token_nll(out, draws), 0).sum(axis=1))
        losses = jax.lax.stop_gradient(losses)
        score = leave_one_out(losses, by_row(out.log_prob)).sum()
        count = batch.loss_mask.sum().astype(score.dtype)
        spread = jnp.abs(losses - losses.mean(axis=1, keepdims=True)).mean(axis=1).sum()
        result = self.next_token.result(out, draws, token_bytes)
        over_draws = lambda sums: jax.tree.map(lambda x: x / self.num_draws, sums)
        policy = {"policy": (score - jax.lax.stop_gradient(score), count)}
        return Result(
            terms=over_draws(result.terms) | policy,
            measures=over_draws(result.measures) | {"draw_spread": (spread, count)},
            stats=result.stats,
        )


def leave_one_out(losses: Float[Array, "B M"], log_prob: Float[Array, "B M"]) -> Float[Array, " B"]:
    """1 / (M - 1) sum_m (L_m - mean L) log Q_m, a number whose gradient descends E[L]."""
    advantage = (losses - losses.mean(axis=1, keepdims=True)) / (losses.shape[1] - 1)
    return (jax.lax.stop_gradient(advantage) * log_prob).sum(axis=1)
