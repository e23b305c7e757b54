"""Pallas's simulator of a GPU behind `compat.interpret_gpu`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from moejax.errors import UserError
from moejax.kernels import compat

needs_simulator = pytest.mark.skipif(
    jax.__version_info__ < (0, 11, 2), reason="needs jax's GPU simulator: jax 0.11.2 or newer"
)


def four_of(x, start):
    """`x[start:start + 4]` by a kernel, which alone knows whether that is within `x`."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def kernel(x_ref, start_ref, out_ref):
        out_ref[...] = x_ref[pl.ds(start_ref[0], 4)]

    call = plgpu.kernel(kernel, out_type=jax.ShapeDtypeStruct((4,), x.dtype))
    return jax.block_until_ready(call(x, jnp.full(1, start, jnp.int32)))


@needs_simulator
def test_runs_a_gpu_kernel_on_any_platform():
    x = jnp.arange(16.0)
    assert compat.gpu_interpretation() is None
    with compat.interpret_gpu(detect_races=True):
        assert compat.gpu_interpretation().detect_races
        np.testing.assert_array_equal(four_of(x, 8), [8, 9, 10, 11])
    assert compat.gpu_interpretation() is None


@needs_simulator
def test_reads_past_the_end_are_not_numbers():
    with compat.interpret_gpu():
        np.testing.assert_array_equal(four_of(jnp.arange(16.0), 14), [14, 15, np.nan, np.nan])


@needs_simulator
def test_is_usable_after_an_exception_in_a_kernel():
    x = jnp.arange(16.0)
    with (
        pytest.raises(jax.errors.JaxRuntimeError, match="[Oo]ut-of-bounds"),
        compat.interpret_gpu(out_of_bounds_reads="raise"),
    ):
        four_of(x, 14)
    assert compat.gpu_interpretation() is None
    with compat.interpret_gpu(detect_races=True):
        np.testing.assert_array_equal(four_of(x, 4), [4, 5, 6, 7])


@pytest.mark.skipif(jax.__version_info__ >= (0, 11, 2), reason="this jax has a GPU simulator")
def test_an_older_jax_is_a_users_error():
    with pytest.raises(UserError, match="0.11.2 or newer"), compat.interpret_gpu():
        pass
