"""The least-loaded plan as one Pallas kernel for TPU (Mosaic): sequential, without launches.

Every step depends on the one before. As XLA operations each is several small kernels; here the
loads are scalars in SMEM, what the devices hold is one vector of P lanes, and a step is a minimum
over it. Mosaic has no argmin of integers, so the helper is the least lane that equals the minimum.

Checked in Pallas's simulator of a TPU and by the TPU compiler; not yet run on hardware.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from moejax.kernels import compat

_MOST = jnp.iinfo(jnp.int32).max


def obstacle() -> str | None:
    """Why it cannot serve here, or None."""
    if compat.target_platform() != "tpu" and compat.interpretation() is None:
        return f"it runs on TPU, and this is {compat.target_platform()}"
    return None


def plan(loads: Array, capacity: Array, min_chunk: Array, num_devices: int) -> Array:
    """The plan, int32 `[E, P]`, for int32 `loads` `[E]` and scalars; P >= 2 divides E > 0."""
    num_experts = loads.shape[0]
    order = jnp.argsort(-loads, stable=True).astype(jnp.int32)
    held = loads.reshape(num_devices, -1).sum(1, dtype=jnp.int32)
    smem, vmem = (pl.BlockSpec(memory_space=space) for space in (pltpu.SMEM, pltpu.VMEM))
    return pl.pallas_call(
        functools.partial(_kernel, per_device=num_experts // num_devices),
        out_shape=jax.ShapeDtypeStruct(
            (num_experts, num_devices),
            jnp.int32,
            manual_axis_type=jax.typeof(loads).manual_axis_type,
        ),
        in_specs=(smem, smem, smem, smem, vmem),
        out_specs=vmem,
        scratch_shapes=[pltpu.SMEM((num_devices,), jnp.int32)],
        interpret=compat.interpretation() or False,
    )(order, loads, jnp.stack([capacity, min_chunk]), held, held[None])


def _kernel(order, loads, limits, native, native_row, out, held, *, per_device: int):
    """Refs in SMEM, but `native_row` `[1, P]` and `out` `[E, P]`.

    What the devices hold is kept twice: in `held`, where a scalar is read at once, and as a vector,
    carried from loop to loop, over which the minimum is taken.
    """
    num_experts, num_devices = out.shape
    capacity, min_chunk = limits[0], limits[1]
    devices = lax.broadcasted_iota(jnp.int32, (1, num_devices), 1)

    def copy(device, _):
        held[device] = native[device]

    def place_chunk(at_home, state):
        rest, held_row, row = state
        others = jnp.where(at_home, _MOST, held_row)
        least = jnp.min(others)
        helper = jnp.min(jnp.where(others == least, devices, num_devices))
        room = capacity - least
        chunk = jnp.where((room >= rest) | (room < min_chunk), rest, room)
        held[helper] += chunk
        at_helper = devices == helper
        held_row = jnp.where(at_helper, held_row + chunk, held_row)
        return rest - chunk, held_row, jnp.where(at_helper, row + chunk, row)

    def place_expert(position, held_row):
        expert = order[position]
        load = loads[expert]
        home = lax.div(expert, jnp.int32(per_device))
        rest = jnp.clip(held[home] - capacity, 0, load)
        held[home] -= rest
        at_home = devices == home
        state = (
            rest,
            jnp.where(at_home, held_row - rest, held_row),
            jnp.where(at_home, load - rest, 0),
        )
        place = functools.partial(place_chunk, at_home)
        _, held_row, row = lax.while_loop(lambda s: s[0] > 0, place, state)
        out[pl.ds(expert, 1), :] = row
        return held_row

    lax.fori_loop(0, num_devices, copy, None)
    lax.fori_loop(0, num_experts, place_expert, native_row[...])
