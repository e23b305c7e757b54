"""Softmax attention against its formula, differentiated by JAX, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.kernels.full_attention.softmax import softmax_attention

BATCH, KV_HEADS, SHARED, QUERIES, KEYS, WIDTH = 2, 2, 3, 5, 7, 4


def formula(q, k, v, allowed, sinks=None, scale=None, soft_cap=None):
    """As in the paper, one expression at a time."""
    scale = 1 / np.sqrt(q.shape[-1]) if scale is None else scale
    logits = scale * jnp.einsum("bgqsn,bgmn->bgqsm", q, k)
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    logits = jnp.where(allowed[:, None, None], logits, -jnp.inf)
    if sinks is not None:
        beside = jnp.broadcast_to(sinks.reshape(KV_HEADS, SHARED, 1, 1), (*logits.shape[:-1], 1))
        logits = jnp.concatenate([logits, beside], axis=-1)
    some = (logits > -jnp.inf).any(-1, keepdims=True)
    weights = jnp.where(some, jax.nn.softmax(jnp.where(some, logits, 0), axis=-1), 0)
    return jnp.einsum("bgqsm,bgmn->bgqsn", weights[..., :KEYS], v)


def case(dtype, *, size=1.0):
    """(q, k, v, sinks), what is allowed and a cotangent; one query sees no key at all."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    q = size * draw(BATCH, KV_HEADS, SHARED, QUERIES, WIDTH)
    k, v = draw(BATCH, KV_HEADS, KEYS, WIDTH), draw(BATCH, KV_HEADS, KEYS, WIDTH)
    allowed = rng.random((BATCH, QUERIES, KEYS)) < 0.6
    allowed[0, 2] = False
    return (q, k, v, draw(KV_HEADS * SHARED)), jnp.asarray(allowed), draw(*q.shape)


def value_and_gradients(function, floats, allowed, cotangent, *, sinks):
    floats = floats if sinks else floats[:3]
    with_allowed = lambda q, k, v, *s: function(q, k, v, allowed, *s)
    y, pull = jax.vjp(with_allowed, *floats)
    return y, *pull(cotangent)


@pytest.mark.parametrize("sinks", [False, True])
def test_value_and_gradients_are_the_formulas(sinks):
    with jax.enable_x64(True):
        inputs = case(jnp.float64)
        got = value_and_gradients(softmax_attention, *inputs, sinks=sinks)
        expected = value_and_gradients(formula, *inputs, sinks=sinks)
    assert all(a.dtype == np.float64 for a in got)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)


def test_logits_are_capped_and_sinks_are_not():
    with jax.enable_x64(True):
        inputs = case(jnp.float64, size=3.0)
        capped = lambda f: functools.partial(f, soft_cap=0.8)
        got = value_and_gradients(capped(softmax_attention), *inputs, sinks=True)
        expected = value_and_gradients(capped(formula), *inputs, sinks=True)
        plain = value_and_gradients(formula, *inputs, sinks=True)
    for a, b, c in zip(got, expected, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)
        assert np.abs(b - c).max() > 0.01


@pytest.mark.parametrize("width", [2, 6])
def test_values_have_a_width_of_their_own_and_the_scale_may_be_another(width):
    with jax.enable_x64(True):
        (q, k, v, sinks), allowed, cotangent = case(jnp.float64)
        resized = lambda x: jnp.concatenate([x, x + 1], axis=-1)[..., :width]
        inputs = (q, k, resized(v), sinks), allowed, resized(cotangent)
        got = value_and_gradients(
            functools.partial(softmax_attention, scale=0.9), *inputs, sinks=True
        )
        expected = value_and_gradients(functools.partial(formula, scale=0.9), *inputs, sinks=True)
    assert got[0].shape[-1] == width
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)


def test_a_query_that_may_see_nothing_gets_zero_and_has_no_gradient():
    y, d_q, *_ = value_and_gradients(softmax_attention, *case(jnp.float32), sinks=False)
    assert (y[0, :, :, 2] == 0).all()
    assert (d_q[0, :, :, 2] == 0).all()
    assert np.isfinite(y).all()


@pytest.mark.parametrize("sinks", [False, True])
def test_gradients_are_right_at_huge_logits(sinks):
    """A logarithm of the sum as large as the logits would lose the sum in rounding."""
    size = 1e6
    inputs = case(jnp.float32, size=size)
    got = value_and_gradients(softmax_attention, *inputs, sinks=sinks)
    expected = value_and_gradients(formula, *inputs, sinks=sinks)
    for index, (a, b) in enumerate(zip(got, expected, strict=True)):
        unit = size if index == 2 else 1.0  # the keys' gradient is a sum of queries
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * unit)


def test_bfloat16_is_as_near_as_its_rounding():
    got = value_and_gradients(softmax_attention, *case(jnp.bfloat16), sinks=True)
    exact = value_and_gradients(formula, *case(jnp.float32), sinks=True)
    for a, b in zip(got, exact, strict=True):
        assert a.dtype == jnp.bfloat16
        error = np.abs(np.asarray(a, np.float32) - b).max() / np.abs(b).max()
        assert error < 0.03, error


def test_nothing_as_large_as_the_scores_is_kept_for_the_gradient():
    """What autodiff keeps of the formula is; so the bound can fail."""
    (q, k, v, _), allowed, _ = case(jnp.float32)
    scores = BATCH * KV_HEADS * SHARED * QUERIES * KEYS

    def largest_kept(function):
        _, pull = jax.vjp(lambda q, k, v: function(q, k, v, allowed), q, k, v)
        return max(leaf.size for leaf in jax.tree.leaves(pull))

    assert largest_kept(formula) >= scores
    assert largest_kept(softmax_attention) < scores


@pytest.mark.skipif(
    jax.__version_info__ < (0, 11, 0),
    reason="before jax 0.11 the compiler for CPU ignores barriers, those of jax.checkpoint too",
)
def test_scores_are_not_kept_where_the_forward_pass_is_computed_again_as_well():
    """The compiler would do so: the recomputed scores and those of the backward pass are equal."""
    queries, keys, width = 64, 96, 256
    q = jax.ShapeDtypeStruct((1, 1, 1, queries, width), jnp.float32)
    kv = jax.ShapeDtypeStruct((1, 1, keys, width), jnp.float32)
    every = jnp.ones((1, queries, keys), bool)
    layer = jax.checkpoint(lambda q, k, v: softmax_attention(q, k, v, every))
    loss = lambda q, k, v: jnp.square(layer(q, k, v)).sum()
    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).lower(q, kv, kv).compile()
    num_products = compiled.cost_analysis()["flops"] / (2 * queries * keys * width)
    assert int(num_products) == 9  # two, the same two again, and five of the backward pass
