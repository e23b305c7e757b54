"""Load statistics against hand-computed values."""

import numpy as np
import pytest

from moejax.analysis import routing

EVEN = np.full(8, 1 / 8)
ONE_HOT = np.eye(8)[3]
TOP_TWO = np.array([0.5, 0.5, 0, 0, 0, 0, 0, 0])


@pytest.mark.parametrize(
    "load, vio, entropy, effective",
    [(EVEN, 0.0, 1.0, 8.0), (ONE_HOT, 7.0, 0.0, 1.0), (TOP_TWO, 3.0, 1 / 3, 2.0)],
)
def test_known_loads(load, vio, entropy, effective):
    np.testing.assert_allclose(routing.max_vio(load), vio, atol=1e-12)
    np.testing.assert_allclose(routing.load_entropy(load), entropy, atol=1e-12)
    np.testing.assert_allclose(routing.effective_experts(load), effective, atol=1e-12)


def test_counts_and_shares_give_the_same_statistics():
    counts = np.random.default_rng(0).integers(0, 50, (3, 4, 16))
    shares = counts / counts.sum(-1, keepdims=True)
    for statistic in (routing.max_vio, routing.load_entropy, routing.relative_load):
        np.testing.assert_allclose(statistic(counts), statistic(shares))
    assert routing.max_vio(counts).shape == (3, 4)


def test_spread_runs_from_k_experts_to_all():
    assert routing.load_spread(TOP_TWO, k=2) == pytest.approx(0.0)
    assert routing.load_spread(EVEN, k=2) == pytest.approx(1.0)
    assert routing.load_spread(EVEN, k=8) == 1.0
    half = np.repeat([1 / 4, 0], 4)  # 4 of 8 experts, top-2: a third of the way from 2 to 8
    assert routing.load_spread(half, k=2) == pytest.approx(1 / 3)


def test_dead_experts_by_threshold():
    load = np.array([0.0, 0.004, 0.496, 0.5])
    assert routing.dead_experts(load).tolist() == [True, False, False, False]
    assert routing.dead_experts(load, 0.02).tolist() == [True, True, False, False]


def test_percentiles_are_relative_to_the_even_share():
    load = np.array([[1, 2, 3, 4, 5], [3, 3, 3, 3, 3]]) / 15
    out = routing.load_percentiles(load, [0, 50, 100])
    np.testing.assert_allclose(out, [[1 / 3, 1, 5 / 3], [1, 1, 1]])


def test_normalized_entropy():
    assert routing.normalized_entropy(np.log(16), 16) == pytest.approx(1.0)
    assert routing.normalized_entropy(0.0, 1) == 1.0


def test_a_row_without_choices_has_no_statistics():
    load = np.stack([np.zeros(8), EVEN])
    for statistic in (routing.max_vio, routing.load_entropy, routing.effective_experts):
        empty, even = statistic(load)
        assert np.isnan(empty)
        assert np.isfinite(even)
    assert not routing.dead_experts(load).any()
    np.testing.assert_array_equal(routing.num_dead_experts(load), [np.nan, 0])
    np.testing.assert_array_equal(routing.load_share(load), load)
    assert np.isnan(routing.load_spread(np.zeros(8), k=8))


def test_router_entropy_is_a_mean_over_tokens_and_none_without_tokens():
    entropy = routing.router_entropy([3 * np.log(2), 0.0], [3, 0], 4)
    np.testing.assert_allclose(entropy, [0.5, np.nan])
    np.testing.assert_array_equal(routing.router_entropy([0.0, 0.0], [3, 0], 1), [1, np.nan])


def test_dead_experts_are_counted():
    load = np.array([[0, 2, 6, 0], [2, 2, 2, 2]])
    assert routing.num_dead_experts(load).tolist() == [2, 0]
    assert routing.num_dead_experts(load, 1.0).tolist() == [3, 4]
