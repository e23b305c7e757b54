"""RMSNorm against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.layers.norm import RMSNorm


def _numpy(x, scale, epsilon, num_axes):
    axes = tuple(range(-num_axes, 0))
    mean = np.mean(np.square(x), axis=axes, keepdims=True)
    return x / np.sqrt(mean + epsilon) * scale.reshape(x.shape[-num_axes:])


@pytest.mark.parametrize("num_axes", [1, 2])
def test_equals_numpy_in_float64(num_axes):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 4, 5))
    scale = rng.standard_normal(5 if num_axes == 1 else 20)
    with jax.enable_x64(True):
        norm = RMSNorm(epsilon=1e-3, num_axes=num_axes)
        y = norm.apply({"params": {"scale": jnp.asarray(scale)}}, jnp.asarray(x))
        assert y.dtype == jnp.float64
    np.testing.assert_allclose(y, _numpy(x, scale, 1e-3, num_axes), rtol=1e-12)


def test_bf16_is_normalised_in_float32_and_scaled_before_rounding():
    x = jnp.asarray(np.random.default_rng(1).standard_normal((3, 64)), jnp.bfloat16)
    variables = {"params": {"scale": jnp.full(64, 1.01, jnp.float32)}}
    y = RMSNorm().apply(variables, x)
    expected = RMSNorm().apply(variables, x.astype(jnp.float32)).astype(jnp.bfloat16)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, expected)


def test_zeros_stay_zeros():
    variables = RMSNorm().init(jax.random.key(0), jnp.zeros(4))
    np.testing.assert_array_equal(RMSNorm().apply(variables, jnp.zeros((2, 4))), 0)
