"""Every expert on every device: the weights come to the tokens, and nothing else moves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.parallel.token_shards import on_token_shards
from moejax.types import Routing


@dataclasses.dataclass(frozen=True)
class Local:
    """Dropless: every choice that names an expert is computed where its token is.

    On several devices each gathers all experts' weights for the layer. Right where these are small
    against the rows, or where there is one device.
    """

    def __call__(
        self,
        x: Float[Array, "T D"],
        routing: Routing,
        weights: Any,
        compute: Callable[..., Array],
        *,
        axes: Any = None,
    ) -> tuple[Float[Array, "T D"], dict[str, Array]]:
        def per_device(x, experts, gate, weights):
            return compute(x, experts, gate, weights), {"dropped": jnp.zeros((), jnp.int32)}

        return on_token_shards(per_device, x, routing, weights, axes, split=("tensor",))
