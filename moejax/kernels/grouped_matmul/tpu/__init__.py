"""Grouped matmul on TPU: Pallas kernels for the three products and the GLU, compiled by Mosaic.

Rows are cut on a fixed grid and every (group, tile) pair is one step of the grid, so any R, K and N
do and no weight is copied or transposed in memory. Blocks may hang over the edges: what is read
there is undefined and is selected away, what is written there is dropped.

Checked in Pallas's simulator of a TPU and by the TPU compiler; not yet run on hardware.
"""

from __future__ import annotations

import jax.numpy as jnp

from moejax.kernels import compat
from moejax.kernels.grouped_matmul.tpu.glu import glu, grad_rows_of_glu
from moejax.kernels.grouped_matmul.tpu.rows import forward, grad_lhs
from moejax.kernels.grouped_matmul.tpu.weights import grad_rhs

__all__ = ["DTYPES", "forward", "glu", "grad_lhs", "grad_rhs", "grad_rows_of_glu", "obstacle"]

DTYPES = ("float32", "bfloat16")


def obstacle(dtype) -> str | None:
    """Why this implementation cannot serve operands of `dtype` here, or None."""
    if jnp.dtype(dtype).name not in DTYPES:
        return f"it computes in {' and '.join(DTYPES)}, not in {jnp.dtype(dtype).name}"
    if compat.target_platform() != "tpu" and compat.interpretation() is None:
        return f"it runs on TPU, and this is {compat.target_platform()}"
    return None
