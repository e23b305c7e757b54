"""Seconds that a collective takes on the network between devices, by a stated model.

A mesh axis that leaves the slice (TPU) or the host (GPU) runs at what a device sends out of it;
every other at what it sends within. On a torus a ring along one axis uses that axis' two links of
a device, and half of it where the axis does not wrap around; several torus axes work at once.
Latency is not counted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np

from moejax.parallel.placement import by_slice
from moejax.planning.topology import Topology
from moejax.planning.work import SLICE, Exchange

_RING = 16  # the side of a flat slice that is a ring
_CUBE = 4  # slices made of whole cubes of this side are tori


@dataclasses.dataclass(frozen=True, kw_only=True)
class Link:
    """What a group of devices has between them.

    Attributes:
      bandwidth: that each device sends at, bytes/s.
      spread: seconds for each byte that a device has for the others alike, 0 where `bandwidth`
        says it.
      leaves: whether it leaves the slice or the host.
    """

    bandwidth: float
    spread: float
    leaves: bool


def link(axes: tuple[str, ...], mesh: jax.sharding.Mesh, topology: Topology) -> Link:
    """Between the devices that differ along `axes` of the mesh alone, or between slices."""
    chip = topology.chip
    if chip is None:
        raise ValueError("the CPU's simulated devices have no network")
    group = _group(axes, mesh)
    if chip.torus_axes == 0:
        hosts = len({device.process_index for device in group})
        return Link(bandwidth=chip.slow if hosts > 1 else chip.fast, spread=0, leaves=hosts > 1)
    if axes == (SLICE,):
        return Link(bandwidth=chip.slow, spread=0, leaves=True)
    group = by_slice(group)[0]  # what crosses slices is counted on its own
    places = np.array([device.coords for device in group])
    rings = {i: len(set(places[:, i])) for i in range(3) if len(set(places[:, i])) > 1}
    per_axis = chip.fast / chip.torus_axes
    each = {i: per_axis * _share(n, topology, i) for i, n in rings.items()}
    spread = max((n / (4 * each[i]) for i, n in rings.items()), default=0)
    # Devices of one chip: what joins them is not slower than a link.
    return Link(bandwidth=sum(each.values()) or per_axis, spread=spread, leaves=False)


def seconds(exchange: Exchange, joined: Link) -> float:
    """One call of a collective.

    Gathering and scattering N bytes over n devices send N (n - 1) / n from each, a sum twice that.
    Rows for everybody cross a ring of m devices m / 4 links far on the mean, in both directions.
    """
    num_bytes, n = exchange.num_bytes, exchange.size
    if n == 1:
        return 0.0
    if exchange.kind == "collective-permute":
        return num_bytes / joined.bandwidth
    sent = num_bytes * (n - 1) / n
    if exchange.kind == "all-reduce":
        return 2 * sent / joined.bandwidth
    if exchange.kind in ("all-to-all", "ragged-all-to-all"):
        return max(sent / joined.bandwidth, num_bytes * joined.spread)
    return sent / joined.bandwidth


def _group(axes: tuple[str, ...], mesh: jax.sharding.Mesh) -> list[jax.Device]:
    """The first device and those that differ from it along `axes`."""
    chosen = tuple(slice(None) if name in axes else 0 for name in mesh.axis_names)
    return list(np.asarray(mesh.devices[chosen], dtype=object).flat)


def _share(count: int, topology: Topology, axis: int) -> float:
    """1 for a whole ring, 1/2 for a line of a torus axis, which has no way round."""
    chip = topology.chip
    side = topology.shape[axis] if axis < len(topology.shape) else 1
    if chip.torus_axes == 2:
        wraps = side == _RING
    else:
        wraps = all(n % _CUBE == 0 for n in topology.shape)
    return 1.0 if count == side and wraps else 0.5


def by_axes(exchanges: Mapping[Exchange, int]) -> dict[tuple[str, ...], dict[Exchange, int]]:
    """The collectives of each set of axes."""
    found: dict[tuple[str, ...], dict[Exchange, int]] = {}
    for exchange, count in exchanges.items():
        found.setdefault(exchange.axes, {})[exchange] = count
    return found


def largest_first(exchanges: Mapping[Exchange, int]) -> list[tuple[Exchange, int]]:
    """By the bytes of all calls together."""
    return sorted(exchanges.items(), key=lambda item: (-item[0].num_bytes * item[1], item[0]))
