"""Replayed choices with empty slots, in every router; found by walking the package."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moejax.routers
from moejax.layers.row_keys import row_keys
from moejax.routers.selection import own_scores
from moejax.routers.topk import TopK
from moejax.verification.contracts.cases import make_context, quick_jit
from moejax.verification.contracts.routers import MASK, NUM_EXPERTS, Case
from tests.contract import methods

EMPTY = [-1, -NUM_EXPERTS, NUM_EXPERTS, NUM_EXPERTS + 3]


@pytest.fixture(scope="module", params=methods(moejax.routers))
def case(request):
    return Case(request.param)


@pytest.mark.parametrize("empty", EMPTY)
@pytest.mark.parametrize("drawn", [False, True], ids=["evaluation", "training"])
def test_an_empty_slot_has_no_weight_and_no_gradient(case, empty, drawn):
    key = row_keys(jax.random.key(0), len(MASK)) if drawn else None
    selection = case.routing.experts.at[:, 1].set(empty)
    context = case.context.replace(selection=selection, key=key)
    probe = jnp.asarray(np.random.default_rng(0).standard_normal(selection.shape), jnp.float32)

    def run(variables, context, probe):
        routing = case.call(variables, jnp.asarray(case.x), context)
        return jnp.sum(routing.weights * probe), routing

    grad = quick_jit(jax.grad(run, has_aux=True))
    gradient, routing = grad(case.variables, context, probe)
    real = MASK.reshape(-1)
    np.testing.assert_array_equal(routing.experts, selection)
    np.testing.assert_array_equal(np.asarray(routing.weights)[real, 1], 0)
    assert (np.asarray(routing.weights)[real, 0] > 0).all()
    assert np.isfinite(routing.weights).all()
    if drawn and "log_prob" in routing.extras:
        assert np.isfinite(routing.extras["log_prob"]).all()
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))
    other, _ = grad(case.variables, context, probe.at[:, 1].add(7.0))
    jax.tree.map(np.testing.assert_array_equal, other, gradient)


def test_the_weights_of_what_is_held_sum_to_one():
    logits = np.float32([2, 1, 0, 1.5])
    variables = {"params": {"kernel": jnp.asarray(logits)[None]}}
    selection = jnp.asarray([[0, 3, -1], [1, 4, -4], [5, -2, 4]])

    def weights(normalise):
        router = TopK(k=3, normalise=normalise)
        context = make_context(np.ones((1, 3), bool), num_experts=4, selection=selection)
        run = quick_jit(lambda v, c: router.apply(v, jnp.ones((3, 1)), c)[0])
        return run(variables, context).weights

    p = np.exp(logits) / np.exp(logits).sum()
    one = p[0] / (p[0] + p[3])
    expected = [[one, 1 - one, 0], [1, 0, 0], [0, 0, 0]]
    np.testing.assert_allclose(weights("after"), expected, rtol=1e-6)
    expected = [[p[0], p[3], 0], [p[1], 0, 0], [0, 0, 0]]
    np.testing.assert_allclose(weights("before"), expected, rtol=1e-6)


def test_of_slots_that_are_held_the_scores_and_gradients_are_those_of_plain_indexing():
    rng = np.random.default_rng(0)
    scores = jnp.asarray(rng.standard_normal((50, 16)), jnp.float32)
    probe = jnp.asarray(rng.standard_normal((50, 4)), jnp.float32)
    experts = jax.lax.top_k(scores, 4)[1]
    plain = lambda scores: jnp.take_along_axis(scores, experts, axis=-1)
    ours = lambda scores: own_scores(scores, experts)
    for f in (lambda g: g, lambda g: jax.grad(lambda s: jnp.sum(jnp.sin(g(s)) * probe))):
        np.testing.assert_array_equal(quick_jit(f(ours))(scores), quick_jit(f(plain))(scores))
