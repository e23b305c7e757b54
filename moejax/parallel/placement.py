"""Which device stands where in a mesh: model axes on the fast network, replicas on the slow one."""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.experimental import mesh_utils

from moejax.errors import UserError


def placed(devices: Sequence[Any], sizes: Mapping[str, int]) -> np.ndarray:
    """The devices in the shape of `sizes`, whose axes are ordered from little traffic to much.

    TPUs: every axis follows the torus of their slice, as far as its size lets it. Of several
    slices, which only the data centre's network joins, `data` takes one after another, and the
    other axes stay within one. Others keep their global numbering, which goes host by host, so that
    the last axes lie within one.

    Args:
      devices: as many as `sizes` multiply to. TPUs have `coords`, and `slice_index` where there are
        several slices.
      sizes: {axis: size}, `data` first.

    Raises UserError where an axis other than `data` would have to span slices.
    """
    shape = tuple(sizes.values())
    if devices[0].platform != "tpu":
        if devices[0].platform == "gpu":
            devices = sorted(devices, key=lambda d: d.id)
        return _array(devices).reshape(shape)
    slices = by_slice(devices)
    inside = _inside_one(slices, sizes)
    parts = [_on_torus(part, inside) for part in slices]
    return np.concatenate(parts, axis=0)


def by_slice(devices: Sequence[Any]) -> list[list[Any]]:
    """The devices of each slice; one list where they do not say that they are in slices."""
    found = collections.defaultdict(list)
    for device in devices:
        found[getattr(device, "slice_index", 0)].append(device)
    return [found[index] for index in sorted(found)]


def _inside_one(slices: list[list[Any]], sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of the mesh's part in one slice. Raises UserError where there is none."""
    each = {len(part) for part in slices}
    if len(each) > 1:
        raise UserError(
            f"the mesh would use {' and '.join(map(str, sorted(each)))} devices of different "
            "slices, and must use as many of each: leave mesh.data unset to use all"
        )
    data, *model = sizes.values()
    if data % len(slices):
        stated = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
        raise UserError(
            f"{stated}: the axes after data take {math.prod(model)} devices and must lie within a "
            f"slice of {each.pop()}, so that mesh.data is a multiple of the {len(slices)} slices; "
            "make one of them smaller"
        )
    return (data // len(slices), *model)


def _on_torus(devices: Sequence[Any], shape: tuple[int, ...]) -> np.ndarray:
    """The devices of one slice; in their own order where they are no box or nothing else fits."""
    if not _is_box(devices):
        return _array(devices).reshape(shape)
    for split in (False, True):  # whole torus axes are faster than parts of them
        try:
            return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=split)
        except NotImplementedError:
            continue
    return _array(devices).reshape(shape)


def _is_box(devices: Sequence[Any]) -> bool:
    """Whether the devices fill a box of the torus, as the first ones of a slice may not."""
    places = {(*d.coords, d.core_on_chip) for d in devices}
    low, high = np.min(list(places), axis=0), np.max(list(places), axis=0)
    return len(places) == len(devices) == int(np.prod(high - low + 1))


def _array(devices: Sequence[Any]) -> np.ndarray:
    out = np.empty(len(devices), dtype=object)
    out[:] = devices
    return out
