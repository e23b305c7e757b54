import jax.numpy as jnp
import numpy as np
import pytest

from moejax.errors import UserError
from moejax.kernels.activations import GLU_ACTIVATIONS, glu_activation


@pytest.mark.parametrize(
    "gate, up, want",
    [
        (1, 1, 1.69159153),
        (100, 100, 55.99962503),
        (100, -100, -41.99971877),
        (-2, 0.5, -0.09651207),
    ],
)
def test_clamped_swiglu_has_the_constants_of_gpt_oss(gate, up, want):
    got = glu_activation("swiglu_clamped")(jnp.float32(gate), jnp.float32(up))
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize(
    "name, want",
    [("silu", 2 * 0.73105858), ("gelu", 2 * 0.84134475), ("gelu_tanh", 2 * 0.84119199)],
)
def test_at_gate_one_and_up_two(name, want):
    got = glu_activation(name)(jnp.float32(1), jnp.float32(2))
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("name", GLU_ACTIVATIONS)
def test_zero_stays_zero(name):
    """Tiles rely on it: rows of other groups are read as zero."""
    assert GLU_ACTIVATIONS[name](jnp.zeros(()), jnp.zeros(())) == 0


def test_unknown_name_lists_the_known():
    with pytest.raises(UserError, match="'relu'; use one of gelu, gelu_tanh, silu"):
        glu_activation("relu")
