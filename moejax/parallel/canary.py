"""A start-up check that rows and weights arrive on this mesh as sent, forwards and backwards.

Some drivers, flags and compilers lose or overwrite rows without an error, and a run that starts
there trains on wrong tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Int

from moejax.errors import UserError
from moejax.kernels import compat
from moejax.parallel.exchange import chosen_backend, exchange
from moejax.parallel.fetch import with_foreign

_REMEDIES = ("two_hop", "gather")  # the cheaper first
_DTYPES = ("float32", "bfloat16")
_COLUMNS = 128  # a row is as wide as a TPU's vector
_SPARE = 3  # rows behind the last one
_NOTHING = -1
_OWNED = 2  # experts per device, in the check of weights


def check_exchange(mesh: Mesh, *, axis: str = "expert", backend: str | None = None) -> None:
    """Sends a known pattern over a mesh axis and compares every row, bit for bit, on every device.

    Some pairs of devices exchange nothing, some in one direction only, one a lot; rows name their
    device and place, in float32 and bfloat16, and NaN lies behind them. What must arrive is known
    beforehand, so that `gather` is checked like the other backends. Then the same for weights that
    several devices fetch from one, and for the gradients that they return. Devices that differ in
    other axes only do the same. In a run of several processes all of them must call this.

    Args:
      mesh: the mesh of the run.
      axis: the axis to exchange over; with one device on it there is nothing to check.
      backend: as for `exchange`.

    Raises:
      UserError: wrong rows, or an exchange that cannot run; names the directions, and a backend
        that passed the same check.
    """
    if axis not in mesh.shape:
        raise UserError(f"the mesh has no axis {axis!r}: use one of {', '.join(mesh.axis_names)}")
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        backend = chosen_backend(backend)
    if mesh.shape[axis] == 1 or not (fault := _fault(mesh, axis, backend)):
        return
    others = (name for name in _REMEDIES if name != backend)
    remedy = next((name for name in others if not _fault(mesh, axis, name)), None)
    advice = (
        f"set transport.exchange={remedy!r}, which passed"
        if remedy
        else "no other backend passed, so check the drivers, XLA_FLAGS and the version of jax"
    )
    kind = mesh.devices.flat[0].device_kind
    raise UserError(
        f"exchange={backend!r} {fault} over the {mesh.shape[axis]} devices ({kind}) of the mesh "
        f"axis {axis!r}: {advice}"
    )


def _fault(mesh: Mesh, axis: str, backend: str) -> str:
    """What is wrong with the backend, as a verb phrase; empty if nothing is."""
    try:
        wrong = _wrong_rows(mesh, axis, backend)
    except jax.errors.JaxRuntimeError as error:
        return f"does not run ({str(error).splitlines()[0]})"
    found = [f"{num} wrong rows {where}" for where, num in wrong.items() if num]
    return f"delivers {' and '.join(found)}" if found else ""


def _wrong_rows(mesh: Mesh, axis: str, backend: str) -> dict[str, int]:
    """{direction and dtype: rows that differ from what must arrive, on all devices together}."""
    # Replicated, so that every process can read it and all come to the same verdict.
    counts = _trial(mesh, axis, backend)()
    return {where: int(num.addressable_data(0)) for where, num in counts.items()}


def _trial(mesh: Mesh, axis: str, backend: str) -> Callable[[], dict[str, Array]]:
    """The program that sends the pattern both ways and counts wrong rows."""
    sizes = pattern(mesh.shape[axis])
    num_held, num_rows = (int(sizes.sum(i).max()) + _SPARE for i in (1, 0))
    to_targets, to_sources = _routes(sizes, num_held, num_rows)
    send = functools.partial(
        exchange, sizes=jnp.asarray(sizes), axis=axis, num_rows=num_rows, backend=backend
    )

    def compare() -> dict[str, Array]:
        # Devices that differ in another axis do the same, but each counts its own mistakes.
        me = compat.vary_over(lax.axis_index(axis), mesh.axis_names)
        own = lambda table: jnp.asarray(table)[me]
        arrived, vjp = jax.vjp(send, _named(me, num_held, own(sizes.sum(1))))
        (returned,) = vjp(_named(me, num_rows, own(sizes.sum(0))))
        directions = {
            "forwards": (arrived, _expected(own(to_targets))),
            "backwards": (returned, _expected(own(to_sources))),
        }
        directions |= _weights_and_gradients(me, mesh.shape[axis], axis, backend)
        wrong = {
            f"{direction} in {dtype}": _num_different(got[dtype], want[dtype])
            for direction, (got, want) in directions.items()
            for dtype in _DTYPES
        }
        return lax.psum(wrong, mesh.axis_names)

    return jax.jit(jax.shard_map(compare, mesh=mesh, in_specs=(), out_specs=PartitionSpec()))


def _weights_and_gradients(me: Array, num_devices: int, axis: str, backend: str) -> dict[str, Any]:
    """{what: (what arrived, what must)} of weights in slots and of gradients at their owners."""
    slots = wanted(num_devices)
    gradients = 1 + (np.arange(slots.size).reshape(slots.shape) % 128)  # exact in bfloat16
    totals = np.zeros((num_devices * _OWNED + 1,))
    np.add.at(totals, slots, gradients)
    here = jnp.asarray(slots)[me]
    wide = lambda column: jnp.broadcast_to(column[:, None], (len(column), _COLUMNS))
    fetched, returned = {}, {}
    for dtype in _DTYPES:
        fetch = lambda w, dtype=dtype: with_foreign(
            w, jnp.asarray(slots), jnp.asarray(True), dtype, axis, backend
        )
        (own, fetched[dtype]), vjp = jax.vjp(fetch, _names(me, jnp.arange(_OWNED)))
        gradient = wide(jnp.asarray(gradients, dtype)[me])
        (returned[dtype],) = vjp((jnp.zeros_like(own), gradient))
    names = _names(here // _OWNED, here % _OWNED)
    must = jnp.where((here < num_devices * _OWNED)[:, None], names, 0)
    total = wide(jnp.asarray(totals[:-1].reshape(-1, _OWNED), jnp.float32)[me])
    return {
        "of weights": (fetched, _in_all_dtypes(must)),
        "of weights' gradients": (returned, dict.fromkeys(_DTYPES, total)),
    }


def wanted(num_devices: int) -> Int[np.ndarray, "P 2"]:
    """Foreign experts in two slots of each device, which owns two: some wanted by many or none."""
    device = np.arange(num_devices)
    nothing = num_devices * _OWNED
    first = np.where(device == 0, nothing, 0)  # all want that of the first device
    second = np.where(device % 2 == 0, (device + 1) % num_devices * _OWNED + 1, nothing)
    return np.stack([first, second], axis=1).astype(np.int32)


def pattern(num_devices: int) -> Int[np.ndarray, "P P"]:
    """`sizes` for `exchange`: most pairs differ, some send nothing back, some nothing at all."""
    source, target = np.indices((num_devices, num_devices))
    sizes = 1 + (5 * source + 3 * target) % 11
    sizes[(source > target) & ((source + target) % 2 == 1)] = 0
    sizes[0, -1] += 17
    if num_devices > 3:
        sizes[1] = 0  # a device that sends nothing
        sizes[:, 2] = 0  # one that receives nothing
    return sizes.astype(np.int32)


def _routes(sizes: np.ndarray, num_held: int, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """(device, place) of what arrives at each row of each device, forwards and then backwards."""
    num_devices = len(sizes)
    to_targets = np.full((num_devices, num_rows, 2), _NOTHING, np.int32)
    to_sources = np.full((num_devices, num_held, 2), _NOTHING, np.int32)
    sent, received = np.zeros(num_devices, int), np.zeros(num_devices, int)
    for source, target in np.ndindex(*sizes.shape):
        for _ in range(sizes[source, target]):
            to_targets[target, received[target]] = source, sent[source]
            to_sources[source, sent[source]] = target, received[target]
            sent[source] += 1
            received[target] += 1
    return to_targets, to_sources


def _named(device: Array, num_rows: int, num_used: Array) -> dict[str, Array]:
    """`num_rows` rows of which the first `num_used` name themselves; the others are NaN."""
    place = jnp.arange(num_rows)
    names = _names(device, place)
    return _in_all_dtypes(jnp.where((place < num_used)[:, None], names, jnp.nan))


def _expected(route: Array) -> dict[str, Array]:
    """The rows that arrive by a route `[R, 2]` of (device, place)."""
    device, place = route.T
    return _in_all_dtypes(jnp.where((device != _NOTHING)[:, None], _names(device, place), 0.0))


def _names(device: Array, place: Array) -> Array:
    """Rows `[R, columns]` of digits that bfloat16 holds exactly; none is zero."""
    digits = (device % 128, device // 128, place % 128, place // 128)
    names = jnp.stack(jnp.broadcast_arrays(*digits), -1) + 1
    return jnp.tile(names, (1, _COLUMNS // 4)).astype(jnp.float32)


def _in_all_dtypes(rows: Array) -> dict[str, Array]:
    return {dtype: rows.astype(dtype) for dtype in _DTYPES}


def _num_different(got: Array, want: Array) -> Array:
    bits = [lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}") for x in (got, want)]
    return (bits[0] != bits[1]).any(-1).sum(dtype=jnp.int32)
