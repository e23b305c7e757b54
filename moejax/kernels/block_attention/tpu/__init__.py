"""Block attention on TPU: packed queries meet their blocks in Pallas kernels, compiled by Mosaic.

Choosing, sorting, the own block and putting the parts together are those of `packed`; rows are
gathered by XLA. One key head is computed after another, each by one core: of the two cores that are
one device of TPU v4 and v5p, the other waits.

Checked in Pallas's simulator of a TPU and by the TPU compiler; not yet run on hardware.
"""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp

from moejax.kernels import compat
from moejax.kernels.block_attention import packed_passes
from moejax.kernels.block_attention.tpu import routed

__all__ = ["DTYPES", "LARGEST_BLOCK", "backward", "forward", "obstacle", "plan"]

DTYPES = ("float32", "bfloat16")

# Keys. A whole block, its gradients and the scores of 128 queries are in VMEM together: up to here
# there is room for float32 of width 384 and values as wide, and beyond it for ever less.
LARGEST_BLOCK = 2048

_REGISTER_BYTES = 32  # of one lane: 8 rows of float32, 16 of bfloat16


def obstacle(dtype: Any, block_size: int) -> str | None:
    """Why this implementation cannot serve operands of `dtype` in such blocks here, or None."""
    dtype = jnp.dtype(dtype)
    if dtype.name not in DTYPES:
        return f"it computes in {' and '.join(DTYPES)}, not in {dtype.name}"
    if compat.target_platform() != "tpu" and compat.interpretation() is None:
        return f"it runs on TPU, and this is {compat.target_platform()}"
    rows = _REGISTER_BYTES // dtype.itemsize
    if block_size % rows or block_size > LARGEST_BLOCK:
        return (
            f"it needs blocks of a multiple of {rows} keys in {dtype.name}, and of at most "
            f"{LARGEST_BLOCK}, not of {block_size}; 'packed' and 'scan' serve every block size"
        )
    return None


plan = packed_passes.plan
forward = functools.partial(packed_passes.forward, routed.forward)
backward = functools.partial(packed_passes.backward, routed.backward)
