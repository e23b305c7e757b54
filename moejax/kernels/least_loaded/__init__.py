"""Least-loaded plan: which device computes how many rows of which expert.

Experts that fit stay with their owner; what exceeds a device's capacity goes, in large chunks, to
the device that holds least. (Nguyen et al., Least-Loaded Expert Parallelism, arXiv 2601.17111.)
"""

from __future__ import annotations

import importlib
from types import ModuleType

import jax  # and not jax.numpy as jnp, which is the name of a module of this package
from jax import Array
from jaxtyping import ArrayLike, Int

from moejax.kernels import compat, dispatch

__all__ = ["IMPLEMENTATIONS", "PRODUCTS", "checked_loads", "least_loaded_plan"]

IMPLEMENTATIONS = ("jnp", "pallas")
PRODUCTS = ("plan",)

_PORTABLE = dispatch.Portable("jnp", "it is plain JAX and right everywhere")


def least_loaded_plan(
    loads: Int[ArrayLike, " E"],
    num_devices: int,
    *,
    capacity: Int[ArrayLike, ""],
    min_chunk: Int[ArrayLike, ""],
    implementation: str | None = None,
) -> Int[Array, "E P"]:
    """plan[e, p]: how many rows of expert e device p computes; row e sums to `loads[e]`.

    The owner of expert e is device `e // (E / P)`. Experts are taken by decreasing load, of equal
    ones the lower id first. An owner keeps what fits into its capacity; the rest goes in chunks to
    the least loaded other device (of equal ones the lowest id), each as large as that has room. A
    rest whose chunk would be below `min_chunk` goes there whole, over the capacity. With
    T = sum(loads) <= P capacity, no device gets more than

        capacity + max(0, (P - 2) (min_chunk - 1) - (P capacity - T)).

    Works under jit, scan, lax.map and shard_map. The implementations agree bit for bit with
    `reference.py`, the definition.

    Args:
      loads: rows per expert, none negative, with a sum below 2^31.
      num_devices: P; it divides E.
      capacity: rows a device should hold at most; usually ceil(alpha T / P) with alpha >= 1. May be
        traced. Any value gives a plan whose rows add up.
      min_chunk: the fewest rows for which moving an expert's weights pays; below 1 counts as 1. May
        be traced.
      implementation: "jnp", or "pallas" (one kernel on TPU, where "jnp" is a loop of small ones;
        checked in Pallas's simulator and by the TPU compiler, not yet run on hardware). None lets
        `dispatch.choose` pick: "jnp", until "pallas" was accepted for this kind of device.

    Raises:
      ValueError: E is not a multiple of `num_devices`, or `loads` is no vector of integers.
      UserError: an unknown implementation, or one that cannot serve this call.
    """
    loads = checked_loads("least_loaded_plan", loads, num_devices)
    (name,) = dispatch.choose(
        "least_loaded",
        implementation,
        IMPLEMENTATIONS,
        products=PRODUCTS,
        dtype="int32",
        obstacle=obstacle,
        portable=_PORTABLE,
        caller="least_loaded_plan",
    )
    if num_devices == 1 or not loads.shape[0]:
        return loads.reshape(-1, num_devices)
    capacity, min_chunk = (jax.numpy.asarray(x, jax.numpy.int32) for x in (capacity, min_chunk))
    limits = capacity, jax.numpy.maximum(min_chunk, 1)
    return module(name).plan(*compat.vary_alike((loads, *limits)), num_devices)


def module(name: str) -> ModuleType:
    """The module of an implementation, with `obstacle()` and `plan(loads, capacity, ...)`.

    Imported when first used: Pallas adds half a second to the start of every command.
    """
    return importlib.import_module(f"moejax.kernels.least_loaded.{name}")


def obstacle(name: str) -> str | None:
    """Why the implementation cannot serve here, or None."""
    return module(name).obstacle()


def checked_loads(caller: str, loads: ArrayLike, num_devices: int) -> Int[Array, " E"]:
    """`loads` as int32. Raises ValueError, in the name of `caller`, for what no plan can be of."""
    loads = jax.numpy.asarray(loads)
    if loads.ndim != 1 or not jax.numpy.issubdtype(loads.dtype, jax.numpy.integer):
        raise ValueError(
            f"{caller} needs loads as a vector of integers; got {loads.dtype}{list(loads.shape)}"
        )
    if num_devices < 1 or loads.shape[0] % num_devices:
        raise ValueError(
            f"{caller} got {loads.shape[0]} experts for {num_devices} devices; the number of "
            "experts must be a multiple of the number of devices"
        )
    return loads.astype(jax.numpy.int32)
