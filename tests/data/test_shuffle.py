import numpy as np
import pytest

from moejax.data.shuffle import keys, order, permute


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 7, 16, 17, 100, 1023, 4097])
@pytest.mark.parametrize("seed", [0, 1, 2**62])
def test_is_a_permutation(length, seed):
    out = permute(np.arange(length), length, keys(seed))
    np.testing.assert_array_equal(np.sort(out), np.arange(length))


def test_keys_vary_per_element():
    length = 1000
    a, b = (permute(np.arange(length), length, keys(0, e)) for e in (0, 1))
    both = permute(np.tile(np.arange(length), 2), length, keys(0, np.repeat([0, 1], length)))
    np.testing.assert_array_equal(both, np.concatenate([a, b]))
    assert (a == b).sum() < 10  # about 1 is expected by chance


def test_looks_random():
    """Mean displacement, neighbour distance, and the spread over (position, value) cells."""
    n = 10_000
    out = permute(np.arange(n), n, keys(5))
    assert abs(np.abs(out - np.arange(n)).mean() / n - 1 / 3) < 0.02
    assert abs(np.abs(np.diff(out)).mean() / n - 1 / 3) < 0.02
    cells = np.zeros((20, 20))
    np.add.at(cells, (np.arange(n) * 20 // n, out * 20 // n), 1)
    chi2 = ((cells - n / 400) ** 2 / (n / 400)).sum()  # 361 degrees of freedom
    assert 250 < chi2 < 480


def test_every_permutation_of_three_occurs():
    seen = {tuple(permute(np.arange(3), 3, keys(s))) for s in range(300)}
    assert len(seen) == 6


def test_large_lengths():
    n = 10**12
    index = np.arange(0, n, n // 1000)
    out = permute(index, n, keys(3))
    assert len(np.unique(out)) == len(index)
    assert out.min() >= 0
    assert out.max() < n


def test_golden():
    """Checkpoints count on this order: it must never change."""
    assert permute(np.arange(8), 8, keys(0, 1, 2)).tolist() == [3, 4, 6, 5, 7, 2, 1, 0]
    assert order(8, 0).tolist() == [6, 0, 1, 4, 5, 3, 7, 2]


def test_order_is_a_permutation():
    np.testing.assert_array_equal(np.sort(order(1000, 7)), np.arange(1000))
    assert (order(1000, 7) == order(1000, 8)).sum() < 10
