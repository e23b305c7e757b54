"""The fused GLU kernel for Hopper, in Pallas's simulator of a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.kernels import activations, compat
from moejax.kernels.grouped_matmul import conformance as kit

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < (0, 11, 2), reason="needs jax's GPU simulator: jax 0.11.2 or newer"
)
if jax.__version_info__ >= (0, 11, 2):
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks as simulator

    from moejax.kernels.grouped_matmul.hopper.glu import _gelu, glu
    from moejax.kernels.grouped_matmul.hopper.persistent import Blocks

    small = functools.partial(glu, blocks=Blocks(64, 2))

SHAPE = kit.Shape(rows=300, inner=192, outer=128, held=8)
SIZES = (20, 0, 60, 1, 33, 31, 64, 5)


def conforms(case, *, kernel="small", activation="silu", biased=False, dtype="bfloat16"):
    with compat.interpret_gpu(detect_races=True):
        failures = kit.glu_failures(
            globals()[kernel], case, dtype=dtype, activation=activation, biased=biased
        )
        assert not simulator.get_races().races_found
    assert not failures


def test_matches_float64_by_group_with_nan_in_unused_rows():
    conforms(kit.Case("rows left over", SIZES, SHAPE), biased=True)


@pytest.mark.slow
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("activation", activations.GLU_ACTIVATIONS)
def test_activations_and_biases(activation, biased):
    conforms(kit.Case("rows left over", SIZES, SHAPE), activation=activation, biased=biased)


@pytest.mark.slow
@pytest.mark.parametrize("case", kit.CASES[::3], ids=lambda case: case.name)
def test_group_sizes(case):
    conforms(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", kit.OFFSET_CASES[:4], ids=lambda case: case.name)
def test_group_offset(case):
    conforms(case, biased=True)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_chosen_blocks_and_padded_widths(dtype):
    shape = kit.Shape(rows=301, inner=40, outer=200, held=8)
    conforms(kit.Case("rows left over", SIZES, shape), kernel="glu", biased=True, dtype=dtype)


def test_gelu_is_that_of_the_activations():
    """Also where it is small: a difference of erf and one would lose all digits there."""
    gate = jnp.linspace(-6, 6, 4001, dtype=jnp.float32)
    with jax.enable_x64(True):
        want = activations.gelu(gate.astype(jnp.float64), jnp.float64(2))
    np.testing.assert_allclose(_gelu(gate, jnp.float32(2)), want, rtol=5e-6, atol=0)
