"""Seconds that a collective takes on the network between devices, by a stated model.

On a torus a ring along one axis uses that axis' two links of a device, and half of it where the
axis does not wrap around; several torus axes work at once. What leaves a slice (TPU) or a host
(GPU) leaves through the network cards of all the devices that the group has there, one each.
Latency is not counted.
"""

from __future__ import annotations

import collections
import dataclasses
import math
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
      bandwidth: that each device sends at within its slice or host, bytes/s.
      spread: seconds for each byte that a device has for the others alike, 0 where `bandwidth`
        says it.
      out: that each device sends at out of its slice or host, bytes/s.
      hosts: over how many of them the group lies. each: its devices in the one with fewest.
    """

    bandwidth: float
    spread: float
    out: float = math.inf
    hosts: int = 1
    each: int = 1


def link(axes: tuple[str, ...], mesh: jax.sharding.Mesh, topology: Topology) -> Link:
    """Between the devices that differ along `axes` of the mesh alone, or between slices."""
    chip = topology.chip
    if chip is None:
        raise ValueError("the CPU's simulated devices have no network")
    group = _group(axes, mesh)
    if chip.torus_axes == 0:
        hosts = collections.Counter(device.process_index for device in group)
        each = min(hosts.values())
        return Link(bandwidth=chip.fast, spread=0, out=chip.slow, hosts=len(hosts), each=each)
    if axes == (SLICE,):
        return Link(bandwidth=chip.fast, spread=0, out=chip.slow, hosts=topology.num_slices)
    group = by_slice(group)[0]  # what crosses slices is counted on its own
    places = np.array([device.coords for device in group])
    rings = {i: len(set(places[:, i])) for i in range(3) if len(set(places[:, i])) > 1}
    per_axis = chip.fast / chip.torus_axes
    each = {i: per_axis * _share(n, topology, i) for i, n in rings.items()}
    spread = max((n / (4 * each[i]) for i, n in rings.items()), default=0)
    # Devices of one chip: what joins them is not slower than a link.
    return Link(bandwidth=sum(each.values()) or per_axis, spread=spread)


def seconds(exchange: Exchange, joined: Link) -> float:
    """One call of a collective.

    Gathering and scattering N bytes over n devices send N (n - 1) / n from each, and over h hosts
    N (h - 1) / h from each host, through the cards of all its devices; a sum twice that. Of rows
    for everybody, N (h - 1) / h leave the host from each device. They cross a ring of m devices
    m / 4 links far on the mean, in both directions.
    """
    num_bytes, n = exchange.num_bytes, exchange.size
    if n == 1:
        return 0.0
    if exchange.kind == "collective-permute":
        return num_bytes / (joined.out if joined.hosts > 1 else joined.bandwidth)
    within = num_bytes * (n - 1) / n / joined.bandwidth
    beyond = num_bytes * (joined.hosts - 1) / joined.hosts / joined.out
    if exchange.kind in ("all-to-all", "ragged-all-to-all"):
        return max(within, num_bytes * joined.spread, beyond)
    once = max(within, beyond / joined.each)
    return 2 * once if exchange.kind == "all-reduce" else once


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
