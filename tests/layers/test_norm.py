"""RMSNorm and LayerNorm against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.layers.norm import LayerNorm, RMSNorm


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


def test_layer_norm_equals_numpy_in_float64():
    rng = np.random.default_rng(2)
    x, scale, bias = 3 + rng.standard_normal((2, 3, 8)), rng.random(8), rng.standard_normal(8)
    with jax.enable_x64(True):
        params = {"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}
        y = LayerNorm(epsilon=1e-3).apply({"params": params}, jnp.asarray(x))
        assert y.dtype == jnp.float64
    centred = x - x.mean(-1, keepdims=True)
    expected = centred / np.sqrt(x.var(-1, keepdims=True) + 1e-3) * scale + bias
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)


def test_layer_norm_of_bf16_is_rounded_once():
    x = jnp.asarray(np.random.default_rng(3).standard_normal((3, 64)), jnp.bfloat16)
    params = {"scale": jnp.full(64, 1.01), "bias": jnp.full(64, 0.003)}
    y = LayerNorm().apply({"params": params}, x)
    expected = LayerNorm().apply({"params": params}, x.astype(jnp.float32)).astype(jnp.bfloat16)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, expected)


def test_layer_norm_starts_as_plain_normalisation():
    x = jnp.arange(8.0)
    variables = LayerNorm().init(jax.random.key(0), x)
    y = LayerNorm().apply(variables, x)
    assert (abs(jnp.mean(y)) < 1e-6, round(float(jnp.std(y)), 4)) == (True, 1.0)
