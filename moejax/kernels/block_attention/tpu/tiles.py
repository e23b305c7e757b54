"""How many rows of queries a kernel has in VMEM with one block of keys.

By arithmetic, not by measurement: nothing here has run on hardware.
"""

from __future__ import annotations

from moejax.errors import UserError
from moejax.kernels.grouped_matmul.tpu.blocks import VMEM_LIMIT_BYTES, power_of_2

# A log-sum-exp per row lies along the lanes, so tiles are whole registers of them.
_HEIGHTS = (1024, 512, 256, 128)
_BUDGET_BYTES = VMEM_LIMIT_BYTES - 8 * 2**20  # the rest is for what the compiler keeps


def tile_height(
    num_rows: int, num_blocks: int, *, block_size: int, width: int, value_width: int, itemsize: int
) -> int:
    """Rows of a tile of queries, the same for both passes.

    A step of the grid costs a fixed time, so tiles are high; a tile on a boundary is computed once
    for each of its blocks, so they are at most about a quarter of the mean block's rows.

    Args:
      num_rows, num_blocks: R and J.
      block_size: keys in a block.
      width, value_width: of queries and keys, and of values.
      itemsize: bytes of an element of the operands.

    Raises:
      UserError: a block of such a width has no room.
    """
    wanted = max(_HEIGHTS[-1], power_of_2(num_rows // num_blocks) // 4)
    both = width + value_width
    for height in _HEIGHTS:
        if height <= wanted and _footprint(height, block_size, both, itemsize) <= _BUDGET_BYTES:
            return height
    raise UserError(
        f"moba_attention: implementation 'tpu' has no room for blocks of {block_size} keys of "
        f"width {width} with values of {value_width}; use smaller blocks, or 'packed'"
    )


def _footprint(height: int, block_size: int, both_widths: int, itemsize: int) -> int:
    """Bytes of the backward pass: operands and results twice, products and scores once."""
    operands = (height + block_size) * both_widths * itemsize
    results = (height * itemsize + block_size * 4) * both_widths
    products = (height + block_size) * both_widths * 4
    scores = 4 * height * block_size * 4  # weights and the scores' gradient, wide and rounded
    return 2 * (operands + results) + products + scores
