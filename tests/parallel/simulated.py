"""Meshes of simulated devices, and `lax.ragged_all_to_all` for the CPU, which has none."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from moejax.kernels import compat


def mesh_of(**sizes):
    """A mesh of the first devices, e.g. `mesh_of(data=2, expert=4)`."""
    devices = jax.devices()[: math.prod(sizes.values())]
    axis_types = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types, devices=devices)


def emulate_ragged(monkeypatch):
    """From now on the backend `ragged` is the default and works on CPU."""
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_all_to_all)
    monkeypatch.setattr(compat, "target_platform", lambda: "tpu")


def ragged_all_to_all(
    operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name
):
    """As JAX documents it. All -1 where devices contradict each other or leave their arrays."""
    me = jax.lax.axis_index(axis_name)
    gather = functools.partial(jax.lax.all_gather, axis_name=axis_name)
    # One after the other: XLA's CPU client has mixed up gathers of one device that ran at once.
    known = gather(jnp.stack([input_offsets, send_sizes, output_offsets]))
    starts, sizes, targets = jnp.moveaxis(known, 1, 0)[:, :, me]
    operand, known = jax.lax.optimization_barrier((operand, known))
    row = jnp.arange(output.shape[0])
    for source, rows in enumerate(gather(operand)):
        start, size, target = starts[source], sizes[source], targets[source]
        inside = ((row >= target) & (row < target + size)).reshape(-1, *(1,) * (output.ndim - 1))
        output = jnp.where(inside, rows.at[start + row - target].get(mode="clip"), output)
    ok = jnp.all(sizes == recv_sizes) & jnp.all(starts + sizes <= operand.shape[0])
    ok &= jnp.all(targets + sizes <= output.shape[0])
    return jnp.where(ok, output, jnp.full_like(output, -1))
