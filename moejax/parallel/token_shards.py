"""Runs a function of tokens and expert weights on every device, each with its own part.

The frame that every transport fills in; the only `shard_map` of the model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec
from jaxtyping import Float, Int

from moejax.errors import UserError
from moejax.kernels import compat
from moejax.parallel.sharding import RULES, Names, is_split, split_ways
from moejax.types import Routing, at_least_f32

Body = Callable[[Array, Array, Array, Any], tuple[Array, dict[str, Array]]]
_TOKENS = RULES["tokens"]


def on_token_shards(
    body: Body,
    x: Float[Array, "T D"],
    routing: Routing,
    weights: Any,
    axes: Any,
    *,
    split: tuple[str, ...],
) -> tuple[Float[Array, "T D"], dict[str, Array]]:
    """(y [T, D], counts) of `body(x, experts, gate, weights) -> (y, counts)` on all devices.

    Each device gets its share of the tokens: `x` [T / n, D], the routing's `experts` and `weights`
    [T / n, K]. Where the tokens do not divide, tokens without experts fill up. `y` is summed over
    mesh axes that split `weights` but not tokens (partial sums of `expert_mlp`), in at least
    float32; `counts` over the mesh axes that split tokens. Without a mesh, or within another
    `shard_map`, the one device has everything.

    Args:
      body: what a device does. Gradients of weights that several devices hold are summed.
      weights: pytree of arrays with a leading expert axis.
      axes: the same pytree with the logical axes of each array (a tuple of names) instead; None
        where only the leading axis, the experts, may be split.
      split: the mesh axes that keep splitting the weights; over all others they are gathered.
    """
    if not is_split():
        return body(x, routing.experts, routing.weights, weights)
    num_tokens, num_shards = x.shape[0], split_ways("tokens")
    num_experts = routing.probs.shape[-1]
    fill = -num_tokens % num_shards
    pad = lambda v, value: jnp.pad(v, ((0, fill), (0, 0)), constant_values=value)
    axes = _expert_axes(weights) if axes is None else axes
    specs = jax.tree.map(functools.partial(_weight_spec, split=split), weights, axes)
    whole = functools.partial(_with_sums, body)
    rows = PartitionSpec(_TOKENS, None)
    run = jax.shard_map(
        whole, in_specs=(rows, rows, rows, specs), out_specs=(rows, PartitionSpec())
    )
    y, counts = run(pad(x, 0), pad(routing.experts, num_experts), pad(routing.weights, 0), weights)
    return y[:num_tokens], counts


def _with_sums(body: Body, x: Array, experts: Array, gate: Array, weights: Any):
    (x, gate), weights = _vary_alike((x, gate), weights)
    y, counts = body(x, experts, gate, weights)
    partial = tuple(sorted(compat.varying_axes(y) - set(_TOKENS)))
    if partial:
        y = lax.psum(y.astype(at_least_f32(y.dtype)), partial).astype(y.dtype)
    return y, _sums_over_tokens(counts)


def _vary_alike(rows: Any, weights: Any) -> tuple[Any, Any]:
    """Marks all as varying alike, so that gradients are summed here, once, in at least float32."""
    is_float = lambda v: jnp.issubdtype(v.dtype, jnp.floating)
    widest = lambda v: v.astype(at_least_f32(v.dtype)) if is_float(v) else v
    varying = compat.vary_alike(jax.tree.map(widest, (rows, weights)))
    return jax.tree.map(lambda wide, v: wide.astype(v.dtype), varying, (rows, weights))


def _sums_over_tokens(counts: dict[str, Int[Array, ""]]) -> dict[str, Array]:
    """Summed over devices with different tokens, all in one sum, and the same on all others."""
    own = [compat.vary_over(count, _TOKENS) for count in counts.values()]
    return dict(zip(counts, lax.psum(jnp.stack(own), _TOKENS), strict=True))


def _weight_spec(weight: Array, names: Names, *, split: tuple[str, ...]) -> PartitionSpec:
    mesh = jax.sharding.get_abstract_mesh()
    entries = [tuple(a for a in RULES[name] if a in split) if name else () for name in names]
    for size, name, entry in zip(weight.shape, names, entries, strict=True):
        for axis in entry:
            if size % mesh.shape[axis]:
                raise UserError(
                    f"mesh.{axis}={mesh.shape[axis]} does not divide the {size} of the experts' "
                    f"axis {name!r}: change one of them"
                )
    return PartitionSpec(*(entry or None for entry in entries))


def _expert_axes(weights: Any) -> Any:
    """Logical axes for weights of which only the leading axis, the experts, may be split."""
    return jax.tree.map(lambda w: ("expert",) + (None,) * (jnp.ndim(w) - 1), weights)


def num_owners() -> int:
    """Inside a transport: the devices among which the experts are split."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape["expert"] if "expert" in mesh.manual_axes else 1


def counts_of_all(counts: Int[Array, "E"]) -> Int[Array, "P E"]:
    """Inside a transport: every device's counts, the same on all devices that share experts."""
    mine = jnp.arange(num_owners()) == lax.axis_index("expert")
    return lax.psum(jnp.where(mine[:, None], counts, 0), "expert")


def most_anywhere(values: tuple[Array, ...]) -> Int[Array, " n"]:
    """Inside a transport: the largest of each value on the mesh, for a branch with collectives.

    Devices that share experts agree without asking. Others may not, and where some of a mesh's
    devices skip a collective the rest may wait for them, though they are no part of it.
    """
    mine = jnp.stack([value.astype(jnp.int32) for value in values])
    size = jax.sharding.get_abstract_mesh().shape
    others = [a for a in sorted(compat.varying_axes(mine)) if a != "expert" and size[a] > 1]
    return lax.pmax(mine, tuple(others)) if others else mine
