"""What every router promises; found by walking the package."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moejax.routers
from tests.contract import (
    float_dtypes,
    make_context,
    methods,
    quick_jit,
    random_variables,
    to_dtype,
)

NUM_EXPERTS, D_MODEL = 8, 16
MASK = np.array([[True] * 6, [True] * 4 + [False] * 2])


class Case:
    """A router with parameters, compiled once, and its input `[T, D]`."""

    def __init__(self, router):
        self.router = router
        self.context = make_context(MASK, num_experts=NUM_EXPERTS)
        if hasattr(router, "initial_carry"):
            self.context = self.context.replace(router_carry=router.initial_carry(MASK.size))
        self.x = np.random.default_rng(0).standard_normal((MASK.size, D_MODEL)).astype(np.float32)
        self.variables = random_variables(router, self.x, self.context)
        self.call = lambda variables, x, context: router.apply(variables, x, context)[0]
        self.run = quick_jit(self.call)
        self.routing = self.run(self.variables, self.x, self.context)


@pytest.fixture(scope="module", params=methods(moejax.routers))
def case(request):
    return Case(request.param)


def valid(tree):
    """The rows of real tokens."""
    return jax.tree.map(lambda a: np.asarray(a)[MASK.reshape(-1)], tree)


def per_token(routing):
    return (routing.experts, routing.weights, routing.probs, routing.logits)


def test_routing_is_well_formed(case):
    experts, weights, probs, logits = valid(per_token(case.routing))
    assert experts.dtype == np.int32
    assert experts.shape == weights.shape
    assert probs.shape == logits.shape == (MASK.sum(), NUM_EXPERTS)
    empty = (experts < 0) | (experts >= NUM_EXPERTS)
    assert np.isfinite(weights).all()
    assert (weights >= 0).all()
    assert (weights[empty] == 0).all()
    assert (weights[~empty] > 0).any()
    for row, unused in zip(experts, empty, strict=True):
        assert len(set(row[~unused])) == (~unused).sum()
    assert (probs >= 0).all()
    np.testing.assert_allclose(probs.sum(-1), 1, rtol=1e-5)


@pytest.mark.parametrize("junk", [7.0, np.nan])
def test_padding_changes_nothing(case, junk):
    x = np.where(MASK.reshape(-1, 1), case.x, junk).astype(np.float32)
    other = case.run(case.variables, x, case.context)
    for a, b in zip(valid(per_token(case.routing)), valid(per_token(other)), strict=True):
        np.testing.assert_array_equal(a, b)
    summed = lambda r: {k: v for k, v in r.extras.items() if k != "log_prob"}
    jax.tree.map(np.testing.assert_array_equal, summed(case.routing), summed(other))


def test_permuting_tokens_permutes_the_routing(case):
    order = np.random.default_rng(1).permutation(MASK.size)
    context = make_context(MASK.reshape(-1)[order].reshape(MASK.shape), num_experts=NUM_EXPERTS)
    shuffled = lambda a: jnp.asarray(a).reshape(-1)[order].reshape(MASK.shape)
    context = context.replace(
        positions=shuffled(case.context.positions),
        token_ids=shuffled(case.context.token_ids),
        router_carry=jax.tree.map(lambda a: a[order], case.context.router_carry),
    )
    permuted = case.run(case.variables, case.x[order], context)
    for a, b in zip(per_token(case.routing), per_token(permuted), strict=True):
        np.testing.assert_allclose(np.asarray(a)[order], b, rtol=1e-5, atol=1e-6)


def test_bf16_input_is_routed_in_float32(case):
    x = jnp.asarray(case.x, jnp.bfloat16)
    routing = case.run(case.variables, x, case.context)
    expected = case.run(case.variables, x.astype(jnp.float32), case.context)
    assert routing.weights.dtype == routing.probs.dtype == routing.logits.dtype == jnp.float32
    for a, b in zip(per_token(routing), per_token(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_float64_throughout(case):
    with jax.enable_x64(True):
        variables, x = to_dtype((case.variables, case.x), jnp.float64)
        context = case.context.replace(router_carry=to_dtype(case.context.router_carry, "float64"))
        assert float_dtypes(case.call, variables, x, context) == {"float64"}


def test_gradients_are_finite_and_not_all_zero(case):
    probe = jnp.asarray(np.random.default_rng(2).standard_normal(case.routing.weights.shape))

    def loss(variables, x):
        routing = case.call(variables, x, case.context)
        return jnp.sum(jnp.where(MASK.reshape(-1, 1), routing.weights * probe, 0))

    gradients = jax.tree.leaves(quick_jit(jax.grad(loss, argnums=(0, 1)))(case.variables, case.x))
    assert all(np.isfinite(g).all() for g in gradients)
    assert any(np.abs(g).max() > 0 for g in gradients)


def test_initial_values_do_not_depend_on_x64(case):
    draw = lambda: quick_jit(case.router.init)(jax.random.key(0), case.x, case.context)
    narrow = draw()
    with jax.enable_x64(True):
        wide = draw()
    jax.tree.map(np.testing.assert_array_equal, narrow, wide)
