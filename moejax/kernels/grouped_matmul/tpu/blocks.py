"""Sizes of the blocks that a kernel has in VMEM.

By arithmetic, not by measurement: nothing here has run on hardware.
"""

from __future__ import annotations

import dataclasses
import math

from moejax.kernels import compat

LANES = 128  # elements in the last dimension of a register
SUBLANES = 16  # rows in a register of bfloat16; float32 has 8

# For a kernel's blocks, of 64 MiB per core on TPU v5p and TPU7x and 128 on v5e and v6e. The
# compiler's default is too little for the two matrices of a GLU and for float32 in full precision.
VMEM_LIMIT_BYTES = 48 * 2**20
# What `Footprint` may use of it: the rest is for what the compiler keeps beside the blocks.
_BUDGET_BYTES = VMEM_LIMIT_BYTES - 8 * 2**20

# Two cores share the first dimension of a kernel's grid; on the others a device is one core.
_TWO_CORES = ("TPU v4", "TPU v5", "TPU v5p")


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Rows of a tile, and the widths of a block of the other two dimensions."""

    rows: int
    inner: int
    outer: int


@dataclasses.dataclass(frozen=True)
class Footprint:
    """Bytes of one element in all operands together: of `[R, K]`, `[G, K, N]`, results and sums."""

    rows: int
    weights: int
    results: int
    sums: int

    def of(self, blocks: Blocks) -> int:
        """Bytes of VMEM: operands and results twice, one in use and one under way, sums likewise.

        (The sums' second copy is what the compiler makes of a product before it is added.)
        """
        operands = blocks.inner * (self.rows * blocks.rows + self.weights * blocks.outer)
        return 2 * (operands + (self.results + self.sums) * blocks.rows * blocks.outer)


def blocks_over_rows(
    num_rows: int, num_groups: int, inner: int, outer: int, footprint: Footprint
) -> Blocks:
    """Blocks with all of K where VMEM has room for that in a useful width, for products of rows.

    A group's block of weights then stays in VMEM for all of its rows, and rows are read once per
    block of columns: 512 columns do 512 FLOPs per byte of bfloat16 rows, the two matrices of a GLU
    1,024, where a TPU needs 170 (v5p) to 560 (v6e) to be limited by arithmetic. Otherwise every
    tile of rows reads the weights again, so tiles are as high and as wide as they can.

    A tile on a boundary is computed once for each of its groups. So tiles are a quarter of a group
    high, but fill the matrix unit, and are worth the time that a step of the grid costs.
    """
    height = max(128, power_of_2(num_rows // num_groups) // 4)
    for most_rows, most_columns in ((256, 1024), (256, 512), (128, 512)):
        blocks = Blocks(
            rows=min(height, most_rows, round_up(num_rows, SUBLANES)),
            inner=inner,
            outer=_equal_parts(outer, most_columns),
        )
        if footprint.of(blocks) <= _BUDGET_BYTES:
            return blocks
    return Blocks(min(height, 512, round_up(num_rows, SUBLANES)), 512, _equal_parts(outer, 1024))


def blocks_over_weights(num_rows: int, num_groups: int, inner: int, outer: int) -> Blocks:
    """Blocks of a product that contracts rows: a tile is about as high as a group."""
    height = max(128, min(512, power_of_2(num_rows // num_groups)))
    return Blocks(
        min(height, round_up(num_rows, SUBLANES)),
        min(1024, round_up(inner, LANES)),
        min(512, round_up(outer, LANES)),
    )


def round_up(size: int, unit: int) -> int:
    """The smallest multiple of `unit` that is at least `size`."""
    return -(-size // unit) * unit


def power_of_2(size: int) -> int:
    """The smallest power of two that is at least `size`, and at least 1."""
    return 1 << (max(size, 1) - 1).bit_length()


def _equal_parts(size: int, most: int) -> int:
    """The width of the fewest equal blocks of at most `most` columns that cover `size`."""
    parts = math.ceil(size / most)
    if compat.target_device_kind() in _TWO_CORES:
        parts = round_up(parts, 2)
    return round_up(math.ceil(size / parts), LANES)
