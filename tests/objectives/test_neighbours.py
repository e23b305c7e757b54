"""The table of neighbours: who is near, with which weight, and what is stored."""

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.errors import UserError
from moejax.objectives.neighbours import Neighbours, averaged, nearest

RNG = np.random.default_rng(0)
POINTS = RNG.normal(size=(40, 6)).astype(np.float32)
SUCCESSFUL = RNG.random(40) < 0.6


def by_hand(points, successful, k, sigma):
    found, weights = [], []
    for i, point in enumerate(points.astype(np.float64)):
        others = [j for j in range(len(points)) if j != i and successful[j]]
        distance = [np.linalg.norm(point - points[j]) for j in others]
        order = np.argsort(distance)[:k]
        own = np.exp(-np.square(np.array(distance)[order]) / (2 * sigma**2))
        found.append(np.array(others)[order])
        weights.append(own / own.sum())
    return np.array(found), np.array(weights)


def test_the_nearest_successful_samples_by_gaussian_similarity():
    found, weights = nearest(POINTS, SUCCESSFUL, k=3, sigma=1.5)
    expected, expected_weights = by_hand(POINTS, SUCCESSFUL, 3, 1.5)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(weights, expected_weights, rtol=1e-5)
    assert SUCCESSFUL[found].all()
    assert (found != np.arange(40)[:, None]).all()


def test_sigma_is_the_median_distance_by_default():
    found, weights = nearest(POINTS, SUCCESSFUL, k=2)
    distance = np.linalg.norm(POINTS[:, None].astype(np.float64) - POINTS[found], axis=-1)
    _, expected = nearest(POINTS, SUCCESSFUL, k=2, sigma=float(np.median(distance)))
    np.testing.assert_allclose(weights, expected, rtol=1e-6)


def test_the_order_of_the_samples_does_not_matter():
    order = RNG.permutation(40)
    found, weights = nearest(POINTS, SUCCESSFUL, k=3)
    again, again_weights = nearest(POINTS[order], SUCCESSFUL[order], k=3)
    np.testing.assert_array_equal(order[again], found[order])
    np.testing.assert_allclose(again_weights, weights[order], rtol=1e-6)


def test_equal_embeddings_weigh_equally():
    _, weights = nearest(np.ones((6, 2), np.float32), np.ones(6, bool), k=3)
    np.testing.assert_allclose(weights, 1 / 3)


def test_too_few_successes_are_said():
    with pytest.raises(UserError, match="answers 3 of 40 samples rightly; 3 neighbours"):
        nearest(POINTS, np.arange(40) < 3, k=3)


def test_mean_and_spread_make_up_the_sum_over_neighbours():
    routing = RNG.dirichlet(np.ones(8), size=(40, 2)).astype(np.float32)
    found, weights = nearest(POINTS, SUCCESSFUL, k=3)
    means, spreads = averaged(routing, found, weights)
    own = RNG.dirichlet(np.ones(8), size=(40, 2))
    direct = (weights * np.square(own[:, None] - routing[found]).sum((2, 3))).sum(1)
    np.testing.assert_allclose(np.square(own - means).sum((1, 2)) + spreads, direct, rtol=1e-5)


def test_what_is_written_is_read_and_found(tmp_path):
    keys = np.sort(RNG.integers(0, 2**32, (2, 5), dtype=np.uint32), axis=1)
    table = Neighbours(
        keys=keys,
        salt=3,
        means=RNG.random((5, 2, 8)).astype(np.float32),
        spreads=RNG.random(5).astype(np.float32),
        layers=(4, 7),
    )
    path = tmp_path / "deep" / "n.npz"
    table.save(path)
    again = Neighbours.load(path)
    assert (again.salt, again.layers, again.num_experts) == (3, (4, 7), 8)
    np.testing.assert_array_equal(again.means, table.means)
    asked = np.stack([keys[:, 3], keys[:, 0], [keys[0, 2], 1], [2**32 - 1, 0]], axis=1)
    row, known = again.find(jnp.asarray(asked.astype(np.uint32)))
    assert np.asarray(known).tolist() == [True, True, False, False]
    assert np.asarray(row)[:2].tolist() == [3, 0]


@pytest.mark.parametrize("damage", ["missing", "cut", "other"])
def test_a_file_that_is_none_is_said(tmp_path, damage):
    path = tmp_path / "n.npz"
    if damage == "other":
        np.savez(path, x=np.ones(3))
    elif damage == "cut":
        np.savez(path, x=RNG.random(1000))
        path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(UserError, match=r"n\.npz"):
        Neighbours.load(path)
