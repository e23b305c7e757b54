"""What every balance rule promises; found by walking the package."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moejax.balance
from moejax.models.moe import without_padding
from moejax.types import Routing, add_terms, mean
from tests.contract import float_dtypes, make_context, methods, quick_jit

NUM_EXPERTS, K = 8, 2
MASK = np.ones((4, 6), bool)
MASK[1, 4:] = MASK[2, 1:] = False


def make_routing(logits, mask):
    """Softmax top-k of these logits `[B, S, E]`, as the MoE layer hands it to the rules."""
    mask = jnp.asarray(mask)
    logits = jnp.asarray(logits).reshape(-1, NUM_EXPERTS)
    probs = jax.nn.softmax(logits)
    weights, experts = jax.lax.top_k(probs, K)
    routing = Routing(experts=experts, weights=weights, probs=probs, logits=logits, extras={})
    return without_padding(routing, mask.reshape(-1))


def loads(routing):
    count = np.bincount(np.asarray(routing.experts).reshape(-1), minlength=NUM_EXPERTS + 1)
    return count[:NUM_EXPERTS]


@pytest.fixture(params=methods(moejax.balance))
def rule(request):
    return request.param


@pytest.fixture(scope="module")
def logits():
    return np.random.default_rng(0).standard_normal((*MASK.shape, NUM_EXPERTS)).astype(np.float32)


def terms_of(rule, logits, mask=MASK, **context):
    context = make_context(mask, **context)
    state = rule.state(NUM_EXPERTS)
    return quick_jit(lambda z: rule.terms(make_routing(z, mask), context, state))(logits)


def test_terms_are_named_sums_and_counts_with_a_weight(rule, logits):
    terms = terms_of(rule, logits)
    assert set(terms) == ({rule.name} if rule.name else set())
    for total, count in terms.values():
        assert total.shape == count.shape == ()
        assert np.isfinite(total)
        assert count == MASK.sum()
        assert rule.weight > 0


def test_padding_changes_nothing(rule, logits):
    junk = np.where(MASK[..., None], logits, np.float32(np.nan))
    assert_trees_equal(terms_of(rule, logits), terms_of(rule, junk))


def assert_trees_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_sums_and_counts_add_up_over_microbatches_unless_declared_otherwise(rule, logits):
    routing = make_routing(logits, MASK)
    share = jnp.asarray(loads(routing) / loads(routing).sum(), jnp.float32)
    whole = terms_of(rule, logits, loads=share)
    parts = [
        terms_of(rule, logits[i : i + 2], MASK[i : i + 2], loads=share) for i in range(0, 4, 2)
    ]
    added = add_terms(*parts)
    close = jax.tree.leaves(jax.tree.map(lambda a, b: np.allclose(a, b, rtol=1e-5), whole, added))
    assert all(close) != rule.mesh_dependent


def test_gradients_are_finite(rule, logits):
    def loss(z):
        terms = rule.terms(make_routing(z, MASK), make_context(MASK), rule.state(NUM_EXPERTS))
        return sum((mean(term) for term in terms.values()), jnp.zeros(()))

    gradient = np.asarray(quick_jit(jax.grad(loss))(logits))
    assert np.isfinite(gradient).all()
    assert (gradient[~MASK] == 0).all()


def test_the_state_keeps_its_structure_and_survives_an_empty_step(rule, logits):
    state = rule.state(NUM_EXPERTS)
    stats = {"load": jnp.asarray(loads(make_routing(logits, MASK)), jnp.int32)}
    updated = jax.jit(rule.update)(state, stats)
    assert jax.tree.map(jnp.shape, updated) == jax.tree.map(jnp.shape, state)
    assert jax.tree.map(lambda a: a.dtype, updated) == jax.tree.map(lambda a: a.dtype, state)
    assert all(np.isfinite(v).all() for v in jax.tree.leaves(updated))
    assert_trees_equal(rule.update(updated, {"load": jnp.zeros(NUM_EXPERTS, jnp.int32)}), updated)


def test_selection_bias_is_none_or_one_number_per_expert(rule):
    bias = rule.selection_bias(rule.state(NUM_EXPERTS))
    assert bias is None or bias.shape == (NUM_EXPERTS,)


def test_float64_throughout(rule, logits):
    with jax.enable_x64(True):
        state = jax.tree.map(lambda a: a.astype(jnp.float64), rule.state(NUM_EXPERTS))

        def run(z, state):
            routing = make_routing(z, MASK)
            stats = {"load": jnp.ones(NUM_EXPERTS, jnp.int32)}
            return rule.terms(routing, make_context(MASK), state), rule.update(state, stats)

        assert float_dtypes(run, jnp.asarray(logits, jnp.float64), state) == {"float64"}
