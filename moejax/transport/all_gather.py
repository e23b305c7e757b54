"""Ring of experts: every device sees all tokens of its ring and computes its own experts' share.

Tokens are gathered over the mesh axis `expert` and the results summed and scattered back (MaxText's
"ring of experts"). Best where a token chooses about as many experts as there are devices.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from moejax.parallel.gather import gathered
from moejax.parallel.token_shards import num_owners, on_token_shards
from moejax.types import Routing, at_least_f32


@dataclasses.dataclass(frozen=True)
class AllGather:
    """Dropless; each device holds the tokens of all P devices and up to P times the mean rows."""

    def __call__(
        self,
        x: Float[Array, "T D"],
        routing: Routing,
        weights: Any,
        compute: Callable[..., Array],
        *,
        axes: Any = None,
    ) -> tuple[Float[Array, "T D"], dict[str, Array]]:
        body = functools.partial(_per_device, compute, routing.probs.shape[-1])
        return on_token_shards(body, x, routing, weights, axes, split=("expert", "tensor"))


def _per_device(compute, num_experts: int, x: Array, experts: Array, gate: Array, weights: Any):
    if num_owners() == 1:
        return compute(x, experts, gate, weights), {"dropped": jnp.zeros((), jnp.int32)}
    count = num_experts // num_owners()
    local = lax.all_gather(experts, "expert", tiled=True) - lax.axis_index("expert") * count
    local = jnp.where((local >= 0) & (local < count), local, count)  # others are empty slots here
    x_of_all, gate_of_all = (gathered(own, "expert", 0) for own in (x, gate))
    y = compute(x_of_all, local, gate_of_all, weights)
    y = lax.psum_scatter(y.astype(at_least_f32(y.dtype)), "expert", tiled=True)
    chosen = (experts >= 0) & (experts < num_experts)
    dropped = jnp.sum(chosen, dtype=jnp.int32) - jnp.sum(local < count, dtype=jnp.int32)
    return y.astype(x.dtype), {"dropped": dropped}
