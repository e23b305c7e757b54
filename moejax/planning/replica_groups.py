"""Which devices of a mesh talk to each other in a collective, as the names of mesh axes.

XLA spells the groups of an instruction as lists of devices, `{{0,1},{2,3}}`, as a reshaped and
transposed range, `[2,2]<=[2,2]T(1,0)`, as axes of a mesh, `mesh['a'=2,'b'=2] {'b'}`, whose devices
may be in another order, `mesh['a'=4], device_ids=([2,2]T(1,0)) {'a'}`, or as `{}`, which is
everyone. A device is its position in the mesh, row by row.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

_RANGE = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_LISTS = re.compile(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}")
_AXES = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}")
_ORDER = re.compile(r"\[([\d,]+)\](?:T\(([\d,]+)\))?|([\d,]+)")
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")


def groups(attributes: str, num_devices: int) -> np.ndarray | list[list[int]]:
    """The groups of a collective: `[groups, devices]`, or lists where their sizes differ.

    Of a permutation the groups are (source, target).

    Raises ValueError where the spelling is not one of those above.
    """
    if found := _RANGE.search(attributes):
        shape, bounds, order = (_numbers(text) for text in found.groups())
        devices = np.arange(np.prod(bounds)).reshape(bounds)
        return (devices.transpose(order) if order else devices).reshape(shape)
    if found := _AXES.search(attributes):
        return _along(found[1], found[2], found[3], attributes)
    found = _PAIRS.search(attributes) or _LISTS.search(attributes)
    if found is None:
        raise ValueError(f"no replica groups in {attributes[:200]}")
    listed = [_numbers(text) for text in re.findall(r"\{([\d,]+)\}", found[1])]
    return listed or [list(range(num_devices))]


def spanned(found: np.ndarray | list[list[int]], sizes: Mapping[str, int]) -> tuple[str, ...]:
    """The axes along which devices of one group differ.

    Args:
      found: from `groups`.
      sizes: {axis: size} of the mesh.
    """
    shape = tuple(sizes.values())
    differ = np.zeros(len(shape), bool)
    for group in found:
        places = np.stack(np.unravel_index(np.asarray(group), shape))
        differ |= (places != places[:, :1]).any(axis=1)
    return tuple(axis for axis, is_spanned in zip(sizes, differ, strict=True) if is_spanned)


def _along(mesh: str, order: str | None, names: str, attributes: str) -> np.ndarray:
    """The groups along some axes of a mesh that XLA names itself, devices in its order."""
    bounds = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    chosen = re.findall(r"'([^']+)'", names)
    if ":" in names or not bounds or not set(chosen) <= set(bounds):
        raise ValueError(f"these replica groups cannot be read: {attributes[:200]}")
    axes = list(bounds)
    devices = np.arange(np.prod(list(bounds.values())))
    if order is not None:
        devices = _ordered(devices, order)
    devices = devices.reshape(list(bounds.values()))
    others = [axes.index(name) for name in axes if name not in chosen]
    last = [axes.index(name) for name in chosen]
    size = int(np.prod([bounds[name] for name in chosen]))
    return devices.transpose(others + last).reshape(-1, size)


def _ordered(devices: np.ndarray, order: str) -> np.ndarray:
    """A range in the order `[2,4]T(1,0)`, or `0,2,1,3` as it is."""
    found = _ORDER.fullmatch(order)
    if found is None:
        raise ValueError(f"this order of devices cannot be read: {order[:200]}")
    if found[3]:
        return np.array(_numbers(found[3]))
    shaped = devices.reshape(_numbers(found[1]))
    return shaped.transpose(_numbers(found[2])) if found[2] else shaped


def _numbers(text: str | None) -> list[int]:
    return [int(n) for n in text.split(",") if n] if text else []
