"""Metrics of routing traces: known values, invariances, and brute force over tokens."""

import numpy as np
import pytest

from moejax.analysis import coactivation, multilingual
from moejax.analysis.attribution import attribution, rank_experts
from moejax.analysis.divergence import jensen_shannon
from moejax.analysis.entropy import entropy
from moejax.analysis.expert_choices import activation_share, count_choices

E = 8
LEFT, RIGHT = np.repeat([2 / E, 0], E // 2), np.repeat([0, 2 / E], E // 2)
EVEN, ONE, OTHER = np.full(E, 1 / E), np.eye(E)[1], np.eye(E)[6]


def random_choices(seed=0, num_tokens=50, num_experts=E, k=3):
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(num_experts)[:k] for _ in range(num_tokens)])


def random_distributions(seed, shape=(200, E)):
    """From nearly uniform to nearly one-hot."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=shape) * rng.choice([0.01, 1, 10], (*shape[:-1], 1))
    p = np.exp(z - z.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def test_entropy_in_nats():
    np.testing.assert_allclose(
        entropy([EVEN, ONE, LEFT]), [np.log(8), 0, np.log(4)], rtol=1e-15, atol=0
    )
    assert np.isnan(entropy([0.5, np.nan]))


def test_choices_are_counted_without_empty_slots():
    experts = np.array([[[0, 2], [2, E]], [[-1, 5], [5, 7]]])
    counts = count_choices(experts, E)
    assert counts.tolist() == [[1, 0, 2, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 2, 0, 1]]
    assert activation_share(counts[0], 2).tolist() == [0.5, 0, 1, 0, 0, 0, 0, 0]
    assert count_choices(np.zeros((2, 0, 3)), E).tolist() == [[0] * E] * 2
    assert np.isnan(activation_share(np.zeros(E), 0)).all()


@pytest.mark.parametrize(
    ("a", "b", "jsd", "normalised"),
    [
        (LEFT, LEFT, 0, 0),
        (LEFT, RIGHT, np.log(2), 1),
        (ONE, OTHER, np.log(2), np.log(2) / np.log(E)),
        (ONE, ONE, 0, 0),
        (EVEN, EVEN, 0, 0),
    ],
    ids=["same", "halves", "one-hots", "same one-hot", "both even"],
)
def test_divergences_that_are_known(a, b, jsd, normalised):
    assert jensen_shannon(a, b) == pytest.approx(jsd, abs=1e-15)
    assert multilingual.divergence(a, b) == pytest.approx(normalised, abs=1e-15)


def test_the_divergence_by_its_other_formula():
    """Half the sum of the relative entropies to the mean."""
    p, q = random_distributions(0), random_distributions(1)
    m = (p + q) / 2
    known = ((p * np.log(p / m)).sum(-1) + (q * np.log(q / m)).sum(-1)) / 2
    np.testing.assert_allclose(jensen_shannon(p, q), known, rtol=1e-9, atol=1e-14)
    room = (p * np.log(p * E)).sum(-1) / 2 + (q * np.log(q * E)).sum(-1) / 2
    np.testing.assert_allclose(multilingual.divergence(p, q), known / room, rtol=1e-8)


@pytest.mark.parametrize("measure", [jensen_shannon, multilingual.divergence])
def test_divergences_are_symmetric_and_invariant_to_the_order_of_experts(measure):
    p, q = random_distributions(2), random_distributions(3)
    found = measure(p, q)
    np.testing.assert_array_equal(found, measure(q, p))
    order = np.random.default_rng(4).permutation(E)
    np.testing.assert_allclose(found, measure(p[:, order], q[:, order]), rtol=1e-9, atol=1e-14)
    assert ((found >= 0) & (found <= 1)).all()
    assert found.max() > 0.3  # the bounds were put to the test
    np.testing.assert_allclose(found, measure(7 * p, 0.1 * q), rtol=1e-9, atol=1e-14)


def test_nearly_even_routers_do_not_differ_by_rounding():
    for num_experts in (8, 64, 128):
        noise = 1 + 1e-10 * np.random.default_rng(0).normal(size=(200, num_experts))
        assert not multilingual.divergence(noise[:100], noise[100:]).any()
    assert np.isnan(multilingual.divergence(np.zeros(E), EVEN))
    assert np.isnan(jensen_shannon(np.zeros(E), EVEN))


def test_sentence_pairs_are_averaged_after_the_division():
    q_a = np.stack([[LEFT, ONE], [LEFT, ONE]])  # [N, L, E]
    q_b = np.stack([[RIGHT, ONE], [LEFT, OTHER]])
    found = multilingual.mean_divergence(q_a, q_b)
    np.testing.assert_allclose(found, [0.5, np.log(2) / np.log(E) / 2])
    with pytest.raises(ValueError, match="equal shapes"):
        multilingual.mean_divergence(q_a, q_b[:1])
    with pytest.raises(ValueError, match="equal shapes"):
        multilingual.mean_divergence(q_a[:0], q_b[:0])


def test_specialised_experts_by_the_difference_of_counts():
    found = multilingual.specialised_experts([0.9, 0.5, 0.1], [0.5, 0.25, 0.6], tau=0.3)
    assert found.tolist() == [True, False, False]
    assert multilingual.specialised_experts([0.75], [0.5], tau=0.25).tolist() == [False]


def test_pairs_are_counted_as_token_by_token():
    experts = random_choices()
    experts[3, 1] = E  # an empty slot
    together = coactivation.count_together(experts, E)
    for i in range(E):
        for j in range(E):
            assert together[i, j] == sum(i in row and j in row for row in experts)
    share = coactivation.together_share(together, len(experts))
    assert share[2, 5] == together[2, 5] / 50
    given = coactivation.given_choice(together)
    assert given[2, 5] == together[2, 5] / (experts == 2).any(axis=1).sum()
    assert (np.diagonal(given) == 1).all()


def test_two_experts_that_always_come_together():
    """Tokens choose (0, 1) or (2, 3), equally often: one choice says which of four the other is."""
    experts = np.array([[0, 1], [1, 0], [2, 3], [3, 2]])
    together = coactivation.count_together(experts, 5)
    lift = coactivation.pair_lift(together)
    assert lift[0, 1] == lift[1, 0] == pytest.approx(4)
    assert lift[0, 2] == 0
    assert np.isnan(np.diagonal(lift)).all()
    assert np.isnan(lift[4]).all()
    assert coactivation.choice_information(together) == pytest.approx(np.log(4))
    assert coactivation.strongest_pairs(together, 9) == [(0, 1, 1.0), (2, 3, 1.0)]
    # 8 ordered pairs of choices, a quarter of them begins with 0: 8 / 16 tokens by chance.
    assert coactivation.pair_lift(together, min_expected=0.5)[0, 1] == pytest.approx(4)
    assert np.isnan(coactivation.pair_lift(together, min_expected=0.51)).all()


def test_even_and_independent_choices():
    together = np.full((E, E), 6)
    np.testing.assert_allclose(
        coactivation.pair_lift(together)[~np.eye(E, dtype=bool)], E / (E - 1)
    )
    assert coactivation.choice_information(together) == pytest.approx(np.log(E / (E - 1)))


def test_a_busy_expert_is_no_ones_partner_for_that():
    """Expert 0 is in every token, beside one of the others: chance has nothing else to give."""
    experts = np.stack([np.zeros(70, int), np.tile(np.arange(1, E), 10)], axis=1)
    lift = coactivation.pair_lift(coactivation.count_together(experts, E))
    np.testing.assert_allclose(lift[0, 1:], 2)
    assert (lift[1, 2:] == 0).all()


def test_without_pairs_nothing_is_said():
    together = coactivation.count_together(np.array([[0], [3]]), 4)
    assert np.isnan(coactivation.choice_information(together))
    assert np.isnan(coactivation.pair_lift(together)).all()
    assert coactivation.strongest_pairs(together, 3) == []


def test_attribution_is_a_mean_of_means_and_sums_to_one_per_layer():
    long, short = random_distributions(5, (90, 2, E)), random_distributions(6, (3, 2, E))
    scores = attribution(np.stack([long.mean(0), short.mean(0)]))
    np.testing.assert_allclose(scores, long.mean(0) / 2 + short.mean(0) / 2)
    np.testing.assert_allclose(scores.sum(-1), 1, rtol=1e-14)
    assert not np.allclose(scores, np.concatenate([long, short]).mean(0))
    with pytest.raises(ValueError, match="at least one sequence"):
        attribution(np.zeros((0, 2, E)))


def test_the_best_expert_is_that_of_brute_force_over_all_layers():
    for seed in range(20):
        scores = random_distributions(seed, (5, E))
        ((row, expert, score),) = rank_experts(scores, 1)
        best = max((scores[r, e], r, e) for r in range(5) for e in range(E))
        assert (score, row, expert) == best
    everything = rank_experts(scores, 100)
    assert [score for *_, score in everything] == sorted(scores.ravel(), reverse=True)
    assert {(row, expert) for row, expert, _ in everything} == set(np.ndindex(5, E))
    assert rank_experts(np.full((2, 2), 0.5), 3) == [(0, 0, 0.5), (0, 1, 0.5), (1, 0, 0.5)]
