"""ReMix's router: equal weights, draws without replacement, the most probable without a key."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.adapters.remix import PlackettLuce, log_probability
from moejax.errors import UserError
from moejax.layers.reports import REPORTS
from moejax.layers.row_keys import row_keys
from moejax.verification.contracts.cases import make_context, quick_jit

LOGITS = np.array([0.4, -1.0, 1.2, 0.1, -0.3])
Q = np.exp(LOGITS) / np.exp(LOGITS).sum()


def drawn(router, logits, num, key):
    """`num` mixtures: the features are one 1 each, the gate holds the logits."""
    context = make_context(np.ones((1, num), bool))
    context = context.replace(key=None if key is None else row_keys(key, 1))
    variables = {"lora": {"gate": {"kernel": jnp.asarray(logits)[None]}}}
    run = lambda v: router.apply(v, jnp.ones((1, num, 1)), context, mutable=[REPORTS])[0]
    return quick_jit(run)(variables)


@pytest.mark.parametrize("k, power", [(1, 1.0), (2, 1.0), (3, 0.5)])
def test_weights_are_k_times_the_same_constant(k, power):
    router = PlackettLuce(num_adapters=5, k=k, power=power)
    mixture = drawn(router, np.asarray(LOGITS, np.float32), 200, jax.random.key(0))
    weights = np.asarray(mixture.weights)
    constant = np.float32(k**-power)
    assert set(np.unique(weights)) == {0, constant}
    assert ((weights > 0).sum(-1) == k).all()
    total, count = mixture.report(make_context(np.ones((1, 200), bool))).measures["support_size"]
    assert total / count == pytest.approx(k, rel=1e-6)


def ordered(k):
    return np.array(list(itertools.permutations(range(5), k)))


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_probabilities_of_all_ordered_choices_sum_to_one(k):
    with jax.enable_x64(True):
        choices = jnp.asarray(ordered(k))[:, None]

        def log_probs(logits):
            return log_probability(jnp.broadcast_to(logits, (len(choices), 1, 5)), choices)[:, 0]

        values = np.asarray(quick_jit(log_probs)(jnp.asarray(LOGITS)))
        assert np.exp(values).sum() == pytest.approx(1, abs=1e-12)
        by_hand = [
            np.prod([Q[i] / (1 - Q[list(c[:j])].sum()) for j, i in enumerate(c)])
            for c in ordered(k)
        ]
        np.testing.assert_allclose(np.exp(values), by_hand, rtol=1e-10)
        score = quick_jit(jax.jacrev(log_probs))(jnp.asarray(LOGITS))
        np.testing.assert_allclose(np.exp(values) @ score, 0, atol=1e-14)  # E[grad log Q] = 0


def test_draws_have_these_frequencies():
    """Chi-squared over the 20 ordered pairs; the order of the draws is that of the pair."""
    num = 40_000
    router = PlackettLuce(num_adapters=5, k=2)
    mixture = drawn(router, np.asarray(LOGITS, np.float32), num, jax.random.key(3))
    pairs = [tuple(p) for p in itertools.combinations(range(5), 2)]
    chance = [Q[i] * Q[j] / (1 - Q[i]) + Q[j] * Q[i] / (1 - Q[j]) for i, j in pairs]
    picked = np.asarray(mixture.weights[0]) > 0
    found = [(picked[:, i] & picked[:, j]).sum() for i, j in pairs]
    expected = num * np.array(chance)
    chi = (np.square(found - expected) / expected).sum()
    assert chi < 27.9  # 9 degrees of freedom, 99.9%
    # log_prob tells which of the two came first
    first = {(i, j): Q[i] * Q[j] / (1 - Q[i]) for i, j in itertools.permutations(range(5), 2)}
    values = np.exp(np.asarray(mixture.log_prob[0]))
    for i, j in pairs:
        own = values[picked[:, i] & picked[:, j]]
        share = first[i, j] / (first[i, j] + first[j, i])
        is_first = np.isclose(own, first[i, j], rtol=1e-3)
        assert (is_first | np.isclose(own, first[j, i], rtol=1e-3)).all()
        assert is_first.mean() == pytest.approx(share, abs=0.06)


def test_without_a_key_the_most_probable_set_is_chosen():
    """Of all sets of k, the k most probable have the largest chance to be drawn."""
    rng = np.random.default_rng(0)
    for _ in range(5):
        logits = rng.standard_normal(5)
        q = np.exp(logits) / np.exp(logits).sum()
        chance = {
            pair: sum(q[i] * q[j] / (1 - q[i]) for i, j in itertools.permutations(pair))
            for pair in itertools.combinations(range(5), 2)
        }
        router = PlackettLuce(num_adapters=5, k=2)
        mixture = drawn(router, np.asarray(logits, np.float32), 1, None)
        assert tuple(np.flatnonzero(mixture.weights[0, 0])) == max(chance, key=chance.get)
        assert mixture.log_prob is None


def test_more_than_there_are_cannot_be_chosen():
    with pytest.raises(UserError, match="router.k=6 must be between 1 and the number of adapters"):
        drawn(PlackettLuce(num_adapters=5, k=6), np.zeros(5, np.float32), 1, None)
