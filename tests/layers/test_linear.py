"""The projection, its initialisation and its logical axes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.errors import UserError
from moejax.layers.linear import Linear, matrix_of
from moejax.verification.contracts.cases import make_context, quick_jit

CONTEXT = make_context([[True]])


def test_kernel_then_bias_in_the_dtype_of_x():
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(rng.standard_normal((3, 2))), "bias": jnp.array([1.0, -1.0])}
    x = jnp.asarray(rng.standard_normal((5, 3)), jnp.float32)
    layer = Linear(features=2, use_bias=True)
    y = layer.apply({"params": params}, x, CONTEXT)
    expected = np.asarray(x) @ np.asarray(params["kernel"]) + np.asarray(params["bias"])
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    assert layer.apply({"params": params}, x.astype(jnp.bfloat16), CONTEXT).dtype == jnp.bfloat16


def test_initialisation_has_variance_one_over_fan_in_whatever_x64_says():
    layer = Linear(features=200, use_bias=True, axes=("embed", "mlp"))
    draw = lambda: quick_jit(layer.init)(jax.random.key(0), jnp.zeros((1, 50)), CONTEXT)["params"]
    params = draw()
    assert params["kernel"].names == ("embed", "mlp")
    assert params["bias"].names == ("mlp",)
    kernel = np.asarray(nn.meta.unbox(params)["kernel"])
    assert kernel.std() == pytest.approx(50**-0.5, rel=0.03)
    with jax.enable_x64(True):
        again = np.asarray(nn.meta.unbox(draw())["kernel"])
    np.testing.assert_array_equal(again, kernel)


class _Doubled(Linear):
    """Multiplies by another matrix than the `matrix` that it inherits."""

    def __call__(self, x, context):
        return 2 * Linear.__call__(self, x, context)


class _DoubledSaysSo(_Doubled):
    def __call__(self, x, context):
        return _Doubled.__call__(self, x, context)

    def matrix(self, dtype):
        return 2 * Linear.matrix(self, dtype)


def test_a_matrix_is_that_of_the_call_or_none():
    params = {"params": {"kernel": jnp.arange(6.0).reshape(3, 2)}}
    for layer in (Linear(features=2), _DoubledSaysSo(features=2)):
        kernel = nn.apply(lambda bound: matrix_of(bound, jnp.float32), layer)(params)
        np.testing.assert_array_equal(kernel, layer.apply(params, jnp.eye(3), CONTEXT))
    with pytest.raises(UserError, match=r"_Doubled defines no method matrix\(dtype\)"):
        nn.apply(lambda bound: matrix_of(bound, jnp.float32), _Doubled(features=2))(params)
