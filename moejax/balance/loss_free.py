"""Loss-free balancing: a bias per expert, for selection only, nudged after every step.

Wang et al., "Auxiliary-Loss-Free Load Balancing", arXiv 2408.15664, algorithm 1; DeepSeek-V3.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.balance.rule import CORRECTION_BIAS, Rule
from moejax.types import Stats


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossFreeBias(Rule):
    """b_i += rate * sign(mean load - load_i), from the loads of the whole step.

    The bias is meant for scores in (0, 1); `rate` is in units of the score (DeepSeek-V3: 1e-3).
    A step without tokens leaves it as it is.
    """

    rate: float = 1e-3

    def state(self, num_experts: int) -> dict[str, Array]:
        return {CORRECTION_BIAS: jnp.zeros((num_experts,), jnp.float32)}

    def selection_bias(self, state: dict[str, Array]) -> Float[Array, "E"] | None:
        return state[CORRECTION_BIAS]

    def update(self, state: dict[str, Array], stats: Stats) -> dict[str, Array]:
        bias = state[CORRECTION_BIAS]
        load = stats["load"].astype(bias.dtype)
        return {CORRECTION_BIAS: bias + self.rate * jnp.sign(load.mean() - load)}
