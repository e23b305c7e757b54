"""The weight gradient passes the real GPU compiler at the sizes of published models, without a GPU.

This shows what the simulator cannot: layouts, shared memory, and whether the tensor cores' sums fit
the registers.
"""

import jax.numpy as jnp
import pytest

from moejax.kernels.grouped_matmul.groups import LocalGroups
from tests.kernels import h100, model_shapes
from tests.kernels.h100 import assembler, mesh  # noqa: F401 - fixtures

pytestmark = [pytest.mark.aot, h100.NEEDS_COMPILER]

SHAPES = model_shapes.SHAPES | {"narrow swizzles": (4096, 304, 720, 4)}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("transpose_rhs", [False, True], ids=["KN", "NK"])
@pytest.mark.parametrize("name", SHAPES)
def test_compiles_without_copies(mesh, assembler, name, transpose_rhs, dtype):  # noqa: F811
    from moejax.kernels.grouped_matmul.hopper import weights

    rows, inner, outer, groups = SHAPES[name]

    def gradient(lhs, dout, sizes):
        held = LocalGroups(sizes, 0)
        return weights.grad_rhs(lhs, dout, held, transpose_rhs=transpose_rhs, dtype=dtype)

    lhs, dout = h100.array(mesh, rows, inner), h100.array(mesh, rows, outer)
    sizes = h100.array(mesh, groups, dtype="int32")
    memory = h100.compile_for(mesh, gradient, lhs, dout, sizes).memory_analysis()
    assert memory.temp_size_in_bytes < 2**16  # lists of groups, not operands
    same_as_before = transpose_rhs and inner == outer  # not compiled a second time
    assert assembler() or same_as_before
    for report in assembler():
        assert " 0 bytes spill stores" in report  # the sums stay in registers
