"""Brings experts' weights to devices that help their owners, and the gradients back.

One slot of one array at a time, so that besides the slots no more than one matrix per device of the
axis is in memory. The owner adds the gradients of all copies of an expert in at least float32.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Int

from moejax.kernels import compat
from moejax.parallel.exchange import chosen_backend, ragged
from moejax.parallel.exchange.traffic import Traffic
from moejax.types import at_least_f32


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def with_foreign(
    weights: Any,
    slots: Int[Array, "P F"],
    has_foreign: Bool[Array, ""],
    dtype: Any,
    axis: str,
    backend: str | None,
) -> tuple[Any, Any]:
    """(`weights`, the weights `[F, ...]` of the experts in this device's slots; empty ones are 0).

    Runs inside `shard_map`. Device d owns the experts d M, ..., d M + M - 1. The first result is
    there for the gradient: what comes back from other devices is added to its cotangent in place.

    Args:
      weights: pytree of this device's own experts' weights `[M, ...]`.
      slots: the expert in each slot of every device, the same on all devices; P M is empty.
      has_foreign: whether any slot is filled, the same on all devices; if not, nothing is sent.
      dtype: of the second result, and of what travels. Gradients travel as they come.
      axis: the mesh axis.
      backend: of `exchange`; "ragged" sends only what is wanted, the others blocks for everyone.
    """
    fetch = functools.partial(_fetch, dtype=dtype, axis=axis, backend=chosen_backend(backend))
    empty = lambda w: compat.zeros((slots.shape[1], *w.shape[1:]), dtype, like=w)
    nothing = lambda weights, slots: jax.tree.map(empty, weights)
    return weights, lax.cond(has_foreign, fetch, nothing, weights, slots)


def _save(weights, slots, has_foreign, dtype, axis, backend):
    return with_foreign(weights, slots, has_foreign, dtype, axis, backend), (slots, has_foreign)


def _return_gradients(dtype, axis, backend, saved, gradients):
    slots, has_foreign = saved
    own, foreign = gradients
    total = jax.tree.map(lambda g: g.astype(at_least_f32(g.dtype)), own)
    add = functools.partial(_add_copies, axis=axis, backend=chosen_backend(backend))
    nothing = lambda total, foreign, slots: total
    total = lax.cond(has_foreign, add, nothing, total, foreign, slots)
    return jax.tree.map(lambda t, g: t.astype(g.dtype), total, own), None, None


with_foreign.defvjp(_save, _return_gradients)


@jax.custom_vjp
def joined(parts: tuple[Array, Array], whole: Array) -> Array:
    """`whole`, which is the two `parts` one behind the other; its gradient goes to the parts.

    So that a loop or a branch needs no copy of its own, and the gradient of the first part can be
    where it will be returned.
    """
    return whole


def _split(parts, whole):
    # Of the parts the gradient needs the lengths and dtypes, and nothing else.
    empty = [compat.zeros((0, part.shape[0]), part.dtype, like=part) for part in parts]
    return whole, empty


def _to_parts(empty, gradient):
    first, second = empty
    size = first.shape[1]
    return (gradient[:size].astype(first.dtype), gradient[size:].astype(second.dtype)), None


joined.defvjp(_split, _to_parts)


def _fetch(weights: Any, slots: Array, *, dtype: Any, axis: str, backend: str) -> Any:
    """What lies in this device's slots, `[F, ...]`."""
    send = _send_ragged if backend == "ragged" else _send_dense

    def of(weight: Array) -> Array:
        weight = weight.astype(dtype)
        one_slot = lambda _, wanted: (None, send(weight, wanted, axis))
        return lax.scan(one_slot, None, slots.T)[1]

    return jax.tree.map(of, weights)


def _add_copies(total: Any, foreign: Any, slots: Array, *, axis: str, backend: str) -> Any:
    """`total` `[M, ...]` plus the gradients `foreign` `[F, ...]` of all devices' copies."""
    send_back = _send_back_ragged if backend == "ragged" else _send_back_dense

    # One after another: what arrived is widened as it is added, and never stored wide.
    def add(t, copy):
        local, gradient = copy
        return t.at[local].add(gradient.astype(t.dtype), mode="drop"), None

    def to(total: Array, gradients: Array) -> Array:
        num_owned = total.shape[0]

        def one_slot(t, inputs):
            wanted, gradient = inputs
            local = wanted - lax.axis_index(axis) * num_owned
            local = jnp.where((local >= 0) & (local < num_owned), local, num_owned)
            by_sender = send_back(gradient, wanted // num_owned, axis)
            return lax.scan(add, t, (local, by_sender))[0], None

        return lax.scan(one_slot, total, (slots.T, gradients))[0]

    return jax.tree.map(to, total, foreign)


def _send_ragged(weight: Array, wanted: Array, axis: str) -> Array:
    """The expert that this device wants of all devices' `weight` `[M, ...]`; `wanted` `[P]`."""
    num_owned = weight.shape[0]
    sizes = _sizes(wanted // num_owned)
    starts = jnp.broadcast_to(wanted % num_owned, sizes.shape)
    traffic = Traffic(sizes=sizes, send_starts=starts, recv_starts=jnp.zeros_like(sizes))
    return ragged.move([weight], traffic, axis=axis, num_rows=1)[0][0]


def _send_dense(weight: Array, wanted: Array, axis: str) -> Array:
    num_owned, num_devices = weight.shape[0], wanted.size
    local = wanted - lax.axis_index(axis) * num_owned  # by receiver
    mine = ((local >= 0) & (local < num_owned)).reshape(-1, *(1,) * (weight.ndim - 1))
    blocks = jnp.where(mine, weight[jnp.clip(local, 0, num_owned - 1)], 0)
    arrived = lax.all_to_all(blocks, axis, 0, 0, tiled=True)
    source = (wanted // num_owned)[lax.axis_index(axis)]
    return jnp.where(source < num_devices, arrived[jnp.minimum(source, num_devices - 1)], 0)


def _send_back_ragged(gradient: Array, owner: Array, axis: str) -> Array:
    """What arrives here `[P, ...]`, by sender, if device d sends `gradient` to `owner[d]`."""
    sizes = _sizes(owner).T
    place = jnp.broadcast_to(jnp.arange(owner.size, dtype=sizes.dtype)[:, None], sizes.shape)
    traffic = Traffic(sizes=sizes, send_starts=jnp.zeros_like(sizes), recv_starts=place)
    return ragged.move([gradient[None]], traffic, axis=axis, num_rows=owner.size)[0]


def _send_back_dense(gradient: Array, owner: Array, axis: str) -> Array:
    is_owner = jnp.arange(owner.size) == owner[lax.axis_index(axis)]
    blocks = jnp.where(is_owner.reshape(-1, *(1,) * gradient.ndim), gradient, 0)
    return lax.all_to_all(blocks, axis, 0, 0, tiled=True)


def _sizes(owner: Array) -> Array:
    """`[P, P]`: one row from device s to device d where s owns what d wants."""
    return (jnp.arange(owner.size)[:, None] == owner).astype(jnp.int32)
