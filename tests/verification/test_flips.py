"""The share of choices that a replay changes, and by what margin the oracle's own were better."""

import numpy as np
import pytest

from moejax.verification import flips

E = 8


def of(*tokens):
    """Choices `[L=1, T, K]` of one segment."""
    return {"layers_0": np.array([tokens])}


def test_choices_in_another_order_are_the_same():
    assert flips.share(of([5, 1], [2, 3]), of([1, 5], [3, 2]), E) == 0


def test_one_of_two_choices_is_half():
    assert flips.share(of([5, 7]), of([1, 5]), E) == 0.5
    assert flips.share(of([5, 7], [0, 1]), of([1, 5], [0, 1]), E) == 0.25


def test_empty_slots_are_no_choices():
    assert flips.share(of([0, 1], [E, E]), of([0, 2], [E, E]), E) == 0.5
    assert flips.share(of([E, E]), of([E, E]), E) == 0


def test_an_expert_chosen_twice_is_a_flip():
    assert flips.share(of([3, 3]), of([3, 4]), E) == 0.5


def test_a_model_without_routers_flips_nothing():
    assert flips.share({}, {}, E) == 0
    assert flips.margin({}, {}, {}) == 0


@pytest.mark.parametrize(
    ("replayed", "expected"),
    [
        ([0, 1], 0.0),  # the oracle's own
        ([1, 2], 0.4 - 0.15),  # the best is left out
        ([0, 2], 0.3 - 0.15),
        ([2, 3], 0.4 - 0.1),  # the best for the worst
        ([0, 4], 0.3),  # an empty slot
    ],
)
def test_the_margin_is_between_the_best_left_out_and_the_worst_put_in(replayed, expected):
    probs = np.array([[[0.4, 0.3, 0.15, 0.1], [0.7, 0.1, 0.1, 0.1]]])
    found = flips.margin(of(replayed, [0, 1]), of([1, 0], [0, 1]), {"layers_0": probs})
    assert found == pytest.approx(expected)


def test_the_margin_is_the_largest_of_all_tokens_and_layers():
    probs = {"a": np.array([[[0.6, 0.4]], [[0.51, 0.49]]]), "b": np.array([[[0.1, 0.9]]])}
    own = {"a": np.array([[[0]], [[0]]]), "b": np.array([[[1]]])}
    near = {"a": np.array([[[0]], [[1]]]), "b": np.array([[[1]]])}
    far = near | {"b": np.array([[[0]]])}
    assert flips.margin(near, own, probs) == pytest.approx(0.02)
    assert flips.margin(far, own, probs) == pytest.approx(0.8)


def test_a_replayed_choice_that_would_be_made_by_now_has_no_margin():
    """A flip in an earlier layer moved the oracle's own choice, not rounding in this one."""
    probs = {"layers_0": np.array([[[0.2, 0.8]]])}
    assert flips.margin(of([1]), of([0]), probs) == 0
