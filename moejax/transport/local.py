"""Every expert on every device: compute is called once, on the rows where they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.types import Routing


@dataclasses.dataclass(frozen=True)
class Local:
    """Dropless: every choice that names an expert is computed."""

    def __call__(
        self,
        x: Float[Array, "T D"],
        routing: Routing,
        weights: Any,
        compute: Callable[..., Array],
    ) -> tuple[Float[Array, "T D"], dict[str, Array]]:
        y = compute(x, routing.experts, routing.weights, weights)
        return y, {"dropped": jnp.zeros((), jnp.int32)}
