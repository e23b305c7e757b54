"""Products of narrow activations and wide parameters: values, wide gradients, nothing kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.kernels import compat, mixed_precision


@pytest.fixture
def platform(monkeypatch):
    return lambda name: monkeypatch.setattr(compat, "target_platform", lambda: name)


@pytest.fixture
def mesh8():
    return jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


@pytest.mark.parametrize("name", ["cpu", "tpu"])
@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 1, 3)])
def test_matmul_and_its_gradients(platform, name, leading):
    platform(name)
    rng = np.random.default_rng(0)
    x, w, g = (rng.standard_normal(s) for s in ((*leading, 4), (4, 5), (*leading, 5)))
    with jax.enable_x64(True):
        y, vjp = jax.vjp(mixed_precision.matmul, jnp.asarray(x), jnp.asarray(w))
        dx, dw = vjp(jnp.asarray(g))
    np.testing.assert_allclose(y, x @ w, rtol=1e-12)
    np.testing.assert_allclose(dx, g @ w.T, rtol=1e-12)
    expected = x.reshape(-1, 4).T @ g.reshape(-1, 5)
    np.testing.assert_allclose(dw, expected, rtol=1e-12, atol=1e-12)


def test_matmul_accumulates_in_the_preferred_type(platform):
    platform("cpu")
    x, w = jnp.ones((2, 3, 300), jnp.bfloat16), jnp.ones((300, 1), jnp.bfloat16)
    y = mixed_precision.matmul(x, w, preferred_element_type=jnp.float32)
    assert y.dtype == jnp.float32
    np.testing.assert_array_equal(y, 300)


@pytest.mark.parametrize("name, merged", [("cpu", True), ("gpu", False), ("tpu", False)])
def test_axes_that_may_be_sharded_are_merged_on_cpu_only(platform, name, merged):
    platform(name)
    jaxpr = str(
        jax.make_jaxpr(lambda x, w: mixed_precision.matmul(x, w))(
            jnp.ones((2, 3, 4)), jnp.ones((4, 5))
        )
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
    assert transposed not in gradient(mixed_precision.matmul)


@pytest.mark.parametrize("name", ["cpu", "tpu"])
def test_the_gradient_of_a_wide_matrix_is_never_rounded(platform, name):
    platform(name)
    rng = np.random.default_rng(0)
    x, w, g = (rng.standard_normal(s) for s in ((2, 3, 4), (4, 5), (2, 3, 5)))
    x, g = (jnp.asarray(v, jnp.bfloat16) for v in (x, g))
    y, vjp = jax.vjp(mixed_precision.matmul, x, jnp.asarray(w, jnp.float32))
    dx, dw = vjp(g)
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    exact = np.einsum("bsk,bsn->kn", np.float64(x), np.float64(g))
    np.testing.assert_allclose(dw, exact, rtol=1e-5, atol=1e-6)  # bfloat16 has errors of 4e-3


def test_the_gradient_of_a_wide_bias_is_never_rounded():
    g = jnp.full((8, 100, 3), 1.0078125, jnp.bfloat16)
    y, vjp = jax.vjp(mixed_precision.add_bias, g, jnp.ones(3))
    dy, dbias = vjp(g)
    assert y.dtype == dy.dtype == jnp.bfloat16
    np.testing.assert_array_equal(dbias, np.float32(806.25))  # 808 in bfloat16


def test_the_sum_over_devices_is_wide(mesh8):
    x = jnp.ones((8, 129, 1), jnp.bfloat16).at[0, 0].set(0)
    x = jax.device_put(x, NamedSharding(mesh8, P("data")))
    loss = lambda w: jnp.sum(mixed_precision.matmul(x, w).astype(jnp.float32))
    # The parts, 128 and seven times 129, bfloat16 has; not their sum. The compiler rounds where
    # the program does, which it need not.
    exactly = {"xla_allow_excess_precision": False}
    assert jax.jit(jax.grad(loss), compiler_options=exactly)(jnp.ones((1, 1))) == 1031


def test_a_frozen_matrix_keeps_no_activations(capsys):
    w = jnp.ones((16, 16))

    def saved(function, *args):
        print_saved_residuals(function, *args)
        return capsys.readouterr().out

    x = jnp.ones((32, 16))
    frozen = saved(lambda x: jnp.sum(mixed_precision.matmul(x, w)), x)
    assert "32,16" not in frozen
    trained = saved(lambda x, w: jnp.sum(mixed_precision.matmul(x, w)), x, w)
    assert "32,16" in trained


def test_gradients_in_a_manual_region_are_complete(mesh8):
    def loss(w, x):
        part = lambda w, x: jnp.sum(mixed_precision.matmul(x, w), keepdims=True)[0]
        parts = jax.shard_map(part, mesh=mesh8, in_specs=(P(), P("data")), out_specs=P("data"))
        return jnp.sum(parts(w, x))

    assert jax.jit(jax.grad(loss))(jnp.ones((1, 1)), jnp.ones((24, 1))) == 24
