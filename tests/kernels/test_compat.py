"""What depends on the platform: the order of axes in products, and compiler options."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.kernels import compat


@pytest.fixture
def platform(monkeypatch):
    return lambda name: monkeypatch.setattr(compat, "target_platform", lambda: name)


@pytest.mark.parametrize("name", ["cpu", "tpu"])
@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 1, 3)])
def test_matmul_and_its_gradients(platform, name, leading):
    platform(name)
    rng = np.random.default_rng(0)
    x, w, g = (rng.standard_normal(s) for s in ((*leading, 4), (4, 5), (*leading, 5)))
    with jax.enable_x64(True):
        y, vjp = jax.vjp(compat.matmul, jnp.asarray(x), jnp.asarray(w))
        dx, dw = vjp(jnp.asarray(g))
    np.testing.assert_allclose(y, x @ w, rtol=1e-12)
    np.testing.assert_allclose(dx, g @ w.T, rtol=1e-12)
    expected = x.reshape(-1, 4).T @ g.reshape(-1, 5)
    np.testing.assert_allclose(dw, expected, rtol=1e-12, atol=1e-12)


def test_matmul_accumulates_in_the_preferred_type(platform):
    platform("cpu")
    x, w = jnp.ones((2, 3, 300), jnp.bfloat16), jnp.ones((300, 1), jnp.bfloat16)
    y = compat.matmul(x, w, preferred_element_type=jnp.float32)
    assert y.dtype == jnp.float32
    np.testing.assert_array_equal(y, 300)


@pytest.mark.parametrize("name, merged", [("cpu", True), ("gpu", False), ("tpu", False)])
def test_axes_that_may_be_sharded_are_merged_on_cpu_only(platform, name, merged):
    platform(name)
    jaxpr = str(
        jax.make_jaxpr(lambda x, w: compat.matmul(x, w))(jnp.ones((2, 3, 4)), jnp.ones((4, 5)))
    )
    assert ("reshape" in jaxpr) == merged


def test_on_cpu_the_gradient_has_no_transposed_copy_of_the_cotangent():
    def gradient(multiply):
        def loss(w, x):
            y = jnp.tanh(multiply(x, w)).reshape(2, 64, 2, 32).transpose(0, 2, 1, 3)
            return jnp.sum(y * y)

        x, w = jnp.ones((2, 64, 32)), jnp.ones((32, 64))
        text = jax.jit(jax.grad(loss)).lower(w, x).compile().as_text()
        return text[text.index("ENTRY") :]

    transposed = "= f32[64,128]{1,0} fusion("
    assert transposed in gradient(jnp.matmul)  # or this function is no longer needed
    assert transposed not in gradient(compat.matmul)


def test_compiler_options_are_for_cpu_alone(platform):
    platform("cpu")
    options = compat.compiler_options()
    assert options
    assert jax.jit(jnp.sin, compiler_options=options)(jnp.zeros(2)).sum() == 0
    platform("tpu")
    assert compat.compiler_options() == {}
