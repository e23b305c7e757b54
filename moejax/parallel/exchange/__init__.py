"""Exchange of rows between devices, as many per pair as integers say, and back for the gradient.

Shapes are static and sizes are values, so one compiled program serves every routing.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from moejax.errors import UserError
from moejax.kernels import compat
from moejax.parallel.exchange import gather, ragged, two_hop
from moejax.parallel.exchange.traffic import Traffic, arrivals, fit

__all__ = ["BACKENDS", "chosen_backend", "exchange", "lost_rows"]

BACKENDS = {"ragged": ragged.move, "two_hop": two_hop.move, "gather": gather.move}


def exchange(
    rows: Any,
    sizes: Int[Array, "P P"],
    *,
    axis: str,
    num_rows: int,
    backend: str | None = None,
) -> Any:
    """What the devices on a mesh axis send to this one, R = `num_rows` rows, zeros behind.

    To be called inside `jax.shard_map`, on all P devices of `axis` alike. Rows arrive in the order
    of their sources, and in the source's order within. Every backend does the same, bit for bit:
    rows are moved and nothing is computed, in any dtype. What lies in `rows` behind the last row
    that is sent reaches nothing, nor does a cotangent behind the last row that arrived, be it NaN.

    Differentiates in reverse mode, any number of times: cotangents travel by the same backend, with
    `sizes` transposed. Rows that were not sent get zero; so do integers (as float0).

    Args:
      rows: pytree of arrays `[A, ...]`, A the same for all, sorted by the device that they go to
        and packed from row 0 on.
      sizes: `sizes[s, d]` rows go from device s to device d; none is negative. The same values on
        all devices of `axis`. A row of it adds up to at most A and a column to at most R: `fit`
        cuts what a device does not have, and what finds no room is lost (see `lost_rows`).
      axis: name of the mesh axis.
      num_rows: R, the rows that each device has room for.
      backend: one of `BACKENDS`; None takes "ragged" on TPU and "two_hop" elsewhere.

    Returns:
      The same pytree of arrays `[R, ...]`, varying over `axis`.

    Raises:
      ValueError: shapes or dtypes that do not fit.
      UserError: an unknown backend, or one that the platform lacks.
    """
    backend = chosen_backend(backend)
    leaves, tree = jax.tree.flatten(rows)
    num_devices = lax.axis_size(axis)
    _check(leaves, sizes, num_devices, num_rows)
    varying = (axis, *compat.varying_axes(sizes))
    leaves = [compat.vary_over(leaf, varying) for leaf in leaves]
    if not leaves or 0 in (leaves[0].shape[0], num_rows):
        out = [compat.zeros((num_rows, *v.shape[1:]), v.dtype, like=v) for v in leaves]
        return tree.unflatten(out)
    num_held = leaves[0].shape[0]
    traffic = fit(sizes, num_held=num_held, num_rows=num_rows)
    return tree.unflatten(_exchange(axis, num_held, num_rows, backend, leaves, traffic))


def lost_rows(sizes: Int[Array, "P P"], num_rows: int) -> Int[Array, ""]:
    """Rows of the whole exchange that find no room; 0 for a caller who keeps to `num_rows`.

    At each device the last in order of arrival are lost, on every backend the same ones. They reach
    nobody and their cotangent is zero.
    """
    return jnp.maximum(sizes.sum(0, dtype=jnp.int32) - num_rows, 0).sum(dtype=jnp.int32)


def chosen_backend(backend: str | None) -> str:
    """The backend that serves where code traced here will run; `backend` itself if it can.

    Raises UserError if `backend` is unknown or does not exist there.
    """
    platform = compat.target_platform()
    usable = [name for name in BACKENDS if name != "ragged" or platform != "cpu"]
    if backend is None:
        return "ragged" if platform == "tpu" else "two_hop"
    if backend not in BACKENDS:
        raise UserError(f"exchange={backend!r} is unknown: use {_either(usable)}")
    if backend not in usable:
        raise UserError(f"exchange={backend!r} does not exist on {platform}: use {_either(usable)}")
    return backend


def _either(names: list[str]) -> str:
    *most, last = map(repr, names)
    return f"{', '.join(most)} or {last}"


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _exchange(axis, num_held, num_rows, backend, rows, traffic):
    move = BACKENDS[backend] if lax.axis_size(axis) > 1 else _keep
    return move(rows, traffic, axis=axis, num_rows=num_rows)


def _save(axis, num_held, num_rows, backend, rows, traffic):
    return _exchange(axis, num_held, num_rows, backend, rows, traffic), traffic


def _backward(axis, num_held, num_rows, backend, traffic, cotangents):
    travel = [c for c in cotangents if c.dtype != jax.dtypes.float0]
    back = iter(())
    if travel:
        back = iter(_exchange(axis, num_rows, num_held, backend, travel, traffic.back()))
    integer = lambda c: np.zeros((num_held, *c.shape[1:]), jax.dtypes.float0)
    return [integer(c) if c.dtype == jax.dtypes.float0 else next(back) for c in cotangents], None


_exchange.defvjp(_save, _backward)


def _keep(rows: list[Array], traffic: Traffic, *, axis: str, num_rows: int) -> list[Array]:
    """The exchange of one device with itself: its rows, cut or padded to `num_rows`."""
    coming = arrivals(traffic, lax.axis_index(axis), num_rows)
    grow = max(num_rows - rows[0].shape[0], 0)
    fitted = [jnp.pad(leaf[:num_rows], ((0, grow), *((0, 0),) * (leaf.ndim - 1))) for leaf in rows]
    return [coming.or_zero(leaf) for leaf in fitted]


def _check(leaves: list[Any], sizes: Array, num_devices: int, num_rows: int) -> None:
    if sizes.shape != (num_devices, num_devices) or not jnp.issubdtype(sizes.dtype, jnp.integer):
        raise ValueError(
            f"exchange over {num_devices} devices needs sizes as integers "
            f"[{num_devices}, {num_devices}]; got {sizes.dtype}{list(sizes.shape)}"
        )
    if any(leaf.ndim == 0 for leaf in leaves) or len({leaf.shape[0] for leaf in leaves}) > 1:
        raise ValueError(
            "exchange needs arrays with the same number of rows; got shapes "
            f"{', '.join(str(leaf.shape) for leaf in leaves)}"
        )
    if num_rows < 0:
        raise ValueError(f"exchange needs num_rows of at least 0; got {num_rows}")
