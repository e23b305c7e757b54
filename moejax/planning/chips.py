"""What each kind of device can do: memory, peak, bandwidths. Vendors' figures, per JAX device.

Sources: the pages "TPU v5e", "TPU v5p", "TPU v6e" and "TPU7x (Ironwood)" of Google Cloud's TPU
documentation and NVIDIA's data sheets of H100 SXM and DGX H100. Google states the interconnect of a
chip in both directions together, which is halved here, over all its links. Memory is what the
compiler lets a program use, read from what libtpu 0.0.50 says of one that is too large; of a GPU
the driver's total.
"""

from __future__ import annotations

import dataclasses

from moejax.train.peak import KNOWN

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One kind of device. Bandwidths in bytes/s, in one direction.

    Attributes:
      name: in a topology's name. kind: as JAX calls it.
      memory: bytes that programs can use.
      bandwidth: of the memory.
      fast: what a device sends into its slice or host, over all its links.
      slow: what a device sends out of its slice or host.
      torus_axes: of the slice's network, 0 for a switch. Each axis has a link in both directions.
      per_chip: JAX devices in a chip.
    """

    name: str
    kind: str
    memory: int
    bandwidth: float
    fast: float
    slow: float
    torus_axes: int = 0
    per_chip: int = 1

    @property
    def flops(self) -> float:
        """Dense bfloat16 products, FLOP/s."""
        return KNOWN[self.kind]


CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="v5e",
            kind="TPU v5 lite",
            memory=int(15.75 * GIB),
            bandwidth=800e9,
            fast=200e9,
            slow=25e9 / 8,  # a host of eight chips has 2 x 100 Gbit/s
            torus_axes=2,
        ),
        Chip(
            name="v5p",
            kind="TPU v5",
            memory=int(95.73 * GIB),
            bandwidth=2765e9,
            fast=600e9,
            slow=50e9 / 8,
            torus_axes=3,
        ),
        Chip(
            name="v6e",
            kind="TPU v6 lite",
            memory=int(31.24 * GIB),
            bandwidth=1638e9,
            fast=400e9,
            slow=100e9 / 8,
            torus_axes=2,
        ),
        Chip(
            name="tpu7x",
            kind="TPU7x",
            memory=int(94.74 * GIB),
            bandwidth=7380e9 / 2,
            fast=600e9 / 2,
            slow=100e9 / 8 / 2,
            torus_axes=3,
            per_chip=2,
        ),
        Chip(
            name="h100",
            kind="NVIDIA H100",
            memory=84_942_979_072,
            bandwidth=3350e9,
            fast=450e9,
            slow=400e9 / 8,  # one network card of 400 Gbit/s for each
        ),
    )
}
