"""The load-balance losses against hand-made loads and numpy."""

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.balance.load_balance import (
    LaggedLoadBalance,
    SequenceLoadBalance,
    ShardLoadBalance,
    TwoPassLoadBalance,
)
from moejax.errors import UserError
from moejax.types import Routing, mean
from moejax.verification.contracts.cases import make_context, quick_jit

NUM_EXPERTS = 8


def routing_of(experts, probs):
    """Routing `[T, K]` and `[T, E]` from arrays over `[B, S]`."""
    experts = np.reshape(experts, (-1, np.shape(experts)[-1]))
    probs = np.reshape(probs, (-1, NUM_EXPERTS)).astype(np.float32)
    weights = np.ones(experts.shape, np.float32)
    experts, weights, probs = map(jnp.asarray, (experts, weights, probs))
    return Routing(experts=experts, weights=weights, probs=probs, logits=probs, extras={})


def loss(rule, experts, probs, mask=None, **context):
    mask = np.ones(np.shape(experts)[:2], bool) if mask is None else mask
    state = context.pop("state", None) or rule.state(NUM_EXPERTS)
    context = make_context(mask, **context)
    terms = quick_jit(rule.terms)(routing_of(experts, probs), context, state)
    return float(mean(terms[rule.name]))


@pytest.mark.parametrize("rule", [SequenceLoadBalance(weight=1.0), TwoPassLoadBalance(weight=1.0)])
@pytest.mark.parametrize("k", [1, 2])
def test_perfect_balance_is_one_and_collapse_is_the_number_of_experts(rule, k):
    balanced = np.arange(16).reshape(1, 16, 1) % NUM_EXPERTS + np.arange(k)
    uniform = np.full((1, 16, NUM_EXPERTS), 1 / NUM_EXPERTS)
    assert loss(rule, balanced % NUM_EXPERTS, uniform) == pytest.approx(1.0)
    collapsed = np.zeros((1, 16, 1), int)
    assert loss(rule, collapsed, np.eye(NUM_EXPERTS)[collapsed[..., 0]]) == pytest.approx(8.0)


def test_the_range_of_f_is_what_tells_the_rules_apart():
    """Each sequence uses one expert of its own: balanced over the batch, collapsed in each."""
    experts = np.repeat(np.arange(NUM_EXPERTS), 4).reshape(NUM_EXPERTS, 4, 1)
    probs = np.eye(NUM_EXPERTS)[experts[..., 0]]
    assert loss(TwoPassLoadBalance(weight=1.0), experts, probs) == pytest.approx(1.0)
    assert loss(SequenceLoadBalance(weight=1.0), experts, probs) == pytest.approx(8.0)
    shards = lambda n: loss(ShardLoadBalance(weight=1.0, num_shards=n), experts, probs)
    assert [shards(n) for n in (1, 2, 8)] == pytest.approx([1.0, 2.0, 8.0])
    assert loss(LaggedLoadBalance(weight=1.0), experts, probs) == pytest.approx(1.0)


def test_unequal_padding_weighs_tokens_not_sequences():
    rng = np.random.default_rng(0)
    mask = np.array([[True] * 6, [True, True] + [False] * 4])
    experts = np.where(mask[..., None], rng.integers(0, 8, (2, 6, 2)), NUM_EXPERTS)
    probs = rng.dirichlet(np.ones(8), (2, 6))
    expected = 0.0
    for b in range(2):
        counts = np.bincount(experts[b].reshape(-1), minlength=9)[:8]
        f = counts / counts.sum()
        expected += sum(8 * f @ probs[b, s] for s in range(6) if mask[b, s])
    value = loss(SequenceLoadBalance(weight=1.0), experts, probs, mask)
    assert value == pytest.approx(expected / 8, rel=1e-6)


def test_two_pass_takes_the_given_shares():
    experts = np.zeros((1, 4, 1), int)
    probs = np.tile(np.eye(NUM_EXPERTS)[3], (1, 4, 1))
    share = jnp.asarray(np.eye(NUM_EXPERTS)[3], jnp.float32)
    assert loss(TwoPassLoadBalance(weight=1.0), experts, probs, loads=share) == pytest.approx(8.0)
    assert loss(TwoPassLoadBalance(weight=1.0), experts, probs) == pytest.approx(0.0)


def test_lagged_takes_the_shares_of_the_step_before():
    rule = LaggedLoadBalance(weight=1.0)
    state = rule.update(rule.state(NUM_EXPERTS), {"load": jnp.array([0, 0, 0, 30, 10, 0, 0, 0])})
    np.testing.assert_allclose(state["previous_share"], np.eye(8)[3] * 0.75 + np.eye(8)[4] * 0.25)
    probs = np.tile(np.eye(NUM_EXPERTS)[3], (1, 4, 1))
    assert loss(rule, np.zeros((1, 4, 1), int), probs, state=state) == pytest.approx(6.0)


def test_shards_must_divide_the_sequences():
    rule = ShardLoadBalance(weight=1.0, num_shards=2)
    with pytest.raises(UserError, match="num_shards=2 does not divide the 3 sequences"):
        loss(rule, np.zeros((3, 4, 1), int), np.ones((3, 4, 8)))
