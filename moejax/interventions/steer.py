"""Steers tokens to experts or away from them.

"Multilingual Routing in Mixture-of-Experts", arXiv 2510.04694, section 5: task experts activated
in the middle layers. A soft step is as large as the token's logits are spread; a hard one makes
the choice certain.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.types import AnyArray, Context, pytree

_MARGIN = 1e-3  # relative to the largest logit: room in float32 for the order of thousands


@pytree
class Steer:
    """logits + soft * std(logits), and hard choices above or below all of them.

    Attributes:
      soft: `[E]`, the added multiple of the standard deviation of a token's logits over the
        experts. The paper's best are 0.5 for the steered ones and 0 for the others.
      hard: `[E]`, 1 puts the expert just above every other, -1 just below, 0 leaves it. Experts
        of one sign keep their order, where the paper breaks ties by noise; those that lie nearer
        to each other than 1/8000 of the token's range of logits can become equal. A selection
        bias or groups of experts (DeepSeek-V3) can still choose otherwise: they go by scores, and
        saturated sigmoids are equal where logits are not.
    """

    soft: Float[AnyArray, "*layers E"]
    hard: Float[AnyArray, "*layers E"]

    def __call__(self, logits: Float[Array, "T E"], context: Context) -> Float[Array, "T E"]:
        del context
        moved = logits + self.soft * logits.std(axis=-1, keepdims=True)
        least, most = (f(moved, axis=-1, keepdims=True) for f in (jnp.min, jnp.max))
        margin = _MARGIN * jnp.maximum(jnp.maximum(jnp.abs(least), jnp.abs(most)), 1)
        place = (moved - least) / jnp.maximum(most - least, margin)  # in [0, 1], keeps the order
        above, below = most + margin * (1 + place), least - margin * (2 - place)
        return jnp.where(self.hard > 0, above, jnp.where(self.hard < 0, below, moved))
