"""SRP and SCH: their exact definitions, against exhaustive search and known cases."""

import itertools

import numpy as np
import pytest

from moejax.analysis.segment_cache import segment_cache_hit_rate
from moejax.analysis.segment_routing import segment_routing, window_histogram

E, K = 8, 2


def random_choices(seed, length=40, num_experts=E, k=K):
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(num_experts)[:k] for _ in range(length)])


def constant(length=40):
    return np.tile(np.arange(K), (length, 1))


def srp(choices, window, num_experts=E):
    return segment_routing(window_histogram(choices, num_experts=num_experts, window=window))


def test_windows_of_one_token_lose_nothing():
    found = srp(random_choices(0), 1)
    assert (found.srp, found.kept) == (1, 1)


@pytest.mark.parametrize("window", [1, 4, 16, 40])
def test_constant_routing_loses_nothing(window):
    found = srp(constant(), window)
    assert (found.srp, found.kept) == (1, 1)


@pytest.mark.parametrize("window", [4, 16])
def test_always_on_is_a_lower_bound(window):
    """Threshold 0 keeps every expert for every window: F1 = 2p / (1 + p), p = k / E."""
    for seed in range(5):
        assert srp(random_choices(seed), window).srp >= 2 * (K / E) / (1 + K / E) - 1e-12


def test_one_threshold_is_as_good_as_any_choice_of_windows():
    for seed in range(20):
        choices = random_choices(seed, length=7, num_experts=3, k=1)
        active = (choices[:, :, None] == np.arange(3)).any(axis=1)
        f = np.stack([active[i : i + 3].sum(axis=0) for i in range(5)]).ravel()
        best = max(
            2 * f[list(kept)].sum() / (3 * len(kept) + f.sum())
            for size in range(len(f) + 1)
            for kept in itertools.combinations(range(len(f)), size)
        )
        assert srp(choices, 3, num_experts=3).srp == pytest.approx(best)


def test_experts_of_a_group_share_one_threshold():
    """One always on, one on half of the time: keeping both has F1 2 * 60 / (80 + 60)."""
    found = segment_routing([[0, 0, 0, 0, 10], [0, 0, 10, 0, 0]])
    assert found.srp == pytest.approx(6 / 7)
    assert found.kept == pytest.approx(4 / 3)


def test_short_sequences_and_empty_slots_count_nothing():
    assert not window_histogram(constant(3), num_experts=E, window=4).any()
    empty = np.full((9, K), E)
    assert np.isnan(srp(empty, 4).srp)
    counts = window_histogram(
        np.where([[True], [False]] * 5, constant(10), E), num_experts=E, window=2
    )
    assert counts[0].tolist() == [0, 9, 0]


def sch(choices, capacity, window=4, num_experts=E):
    return segment_cache_hit_rate(
        choices, num_experts=num_experts, capacity=capacity, window=window
    )


def test_the_rate_rises_with_the_cache_to_one():
    for seed in range(10):
        rates = [sch(random_choices(seed), capacity) for capacity in range(1, E + 1)]
        assert rates == sorted(rates)
        assert rates[-1] == 1


def test_a_cache_of_k_experts_serves_constant_routing():
    assert sch(constant(), K) == 1


def test_a_cache_of_one_expert_by_hand():
    """0 is free, 1 evicts it, 1 hits, 0 misses, 0 hits."""
    assert sch(np.array([[0], [1], [1], [0], [0]]), 1, window=1) == 3 / 5


def test_looking_ahead_keeps_what_comes_next():
    """With 1 and 0 cached, 2 must evict one: 1 was used longest ago, but comes next."""
    choices = np.array([[1], [0], [2], [1], [1]])
    assert sch(choices, 2, window=1) == 3 / 5
    assert sch(choices, 2, window=2) == 4 / 5


def test_it_never_beats_the_optimum():
    """Belady's rule, which sees the whole future, for one expert a token."""
    for seed in range(10):
        choices = random_choices(seed, k=1)[:, 0]
        cache, hits, seen = set(), 0, set()
        for step, expert in enumerate(choices):
            hits += expert in cache or (expert not in seen and len(seen) < 3)
            seen.add(expert)
            if expert not in cache and len(cache) == 3:
                future = list(choices[step + 1 :])
                away = lambda e, future=future: future.index(e) if e in future else len(future)
                cache.remove(max(cache, key=away))
            cache.add(expert)
        assert sch(choices[:, None], 3, window=5) <= hits / len(choices)


def test_bad_arguments():
    with pytest.raises(ValueError, match="capacity=0"):
        sch(constant(), 0)
    with pytest.raises(ValueError, match="no expert was chosen"):
        sch(np.full((3, K), E), 2)
