"""Tokens go to their experts' devices and back; each device has room for every token there is.

The plain expert parallelism of GShard (arXiv 2006.16668), without its capacity: nothing is dropped,
and the buffers of R = P A rows are what `least_loaded` exists to avoid.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from moejax.kernels.expert_mlp.slots import sort_slots
from moejax.parallel.planned_rows import journey, local_experts, not_computed, there_and_back
from moejax.parallel.token_shards import counts_of_all, num_owners, on_token_shards
from moejax.types import Routing


@dataclasses.dataclass(frozen=True)
class AllToAll:
    """Dropless whatever the router does, at P times the memory of balanced rows.

    Attributes:
      exchange: a backend of `parallel.exchange`; None picks by platform.
    """

    exchange: str | None = None

    def __call__(
        self,
        x: Float[Array, "T D"],
        routing: Routing,
        weights: Any,
        compute: Callable[..., Array],
        *,
        axes: Any = None,
    ) -> tuple[Float[Array, "T D"], dict[str, Array]]:
        body = functools.partial(self._per_device, compute, routing.probs.shape[-1])
        return on_token_shards(body, x, routing, weights, axes, split=("expert", "tensor"))

    def _per_device(self, compute, num_experts, x, experts, gate, weights):
        num_devices = num_owners()
        if num_devices == 1:
            return compute(x, experts, gate, weights), {"dropped": jnp.zeros((), jnp.int32)}
        by_expert = sort_slots(experts, num_experts)  # and so by owner
        counts = counts_of_all(by_expert.group_sizes)  # [P, E]
        num_owned = num_experts // num_devices
        owner = jnp.arange(num_experts) // num_owned
        split = jnp.where(owner[:, None] == jnp.arange(num_devices), counts[:, :, None], 0)
        me = lax.axis_index("expert")
        places = local_experts(me, num_experts, num_owned, jnp.zeros((0,), jnp.int32))
        num_rows = num_devices * experts.size
        trip = journey(by_expert, split, places, me, num_rows=num_rows)
        y = there_and_back(compute, x, gate, weights, trip, backend=self.exchange)
        dropped = not_computed(
            by_expert, split[:, :, me], places, num_places=num_owned, room=num_rows
        )
        return y, {"dropped": dropped}
