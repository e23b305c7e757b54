"""Grouped matmul on NVIDIA Hopper GPUs: Pallas kernels compiled by Mosaic GPU (TMA and wgmma).

`rows` and `glu` share a persistent kernel whose copies and products run in different warpgroups;
`weights` has one of its own. Products accumulate in float32 from bfloat16 or float16.

Not yet run on hardware: simulated with race detection, and compiled for an H100.
"""

from moejax.kernels.grouped_matmul.hopper.device import obstacle as obstacle
from moejax.kernels.grouped_matmul.hopper.glu import glu as glu
from moejax.kernels.grouped_matmul.hopper.rows import forward as forward
from moejax.kernels.grouped_matmul.hopper.rows import grad_lhs as grad_lhs
from moejax.kernels.grouped_matmul.hopper.weights import grad_rhs as grad_rhs
