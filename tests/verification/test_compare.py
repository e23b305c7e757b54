"""Differences are found tensor by tensor and expert by expert."""

import numpy as np
import pytest

from moejax.verification.compare import compare
from moejax.verification.verify import FLOORS, TOLERANCES

AXES = {"experts/gate": 1, "head": None}


def outcome(**changes):
    base = {
        "loss": np.array(2.0),
        "gradient experts/gate": np.array([[[1000.0, 1.0], [0.001, 0.002]]]),  # [L, E, D]
        "gradient head": np.array([1.0, 2.0]),
        "statistics dropped": np.array(0),
    }
    return base | changes


def worst(found):
    return max(compare(found, outcome(), AXES, floor=1e-6), key=lambda d: d.error)


def test_equal_outcomes_have_no_difference():
    assert worst(outcome()).error == 0


def test_an_error_in_a_small_expert_is_not_lost_in_a_large_one():
    found = worst(outcome(**{"gradient experts/gate": np.array([[[1000, 1], [0.001, 0.001]]])}))
    assert (found.name, found.expert) == ("gradient experts/gate", 1)
    assert found.error == pytest.approx(0.5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_infinitely_wrong(value):
    assert worst(outcome(**{"gradient head": np.array([value, 2.0])})).error == np.inf


def test_a_nan_on_both_sides_is_no_agreement():
    nan = {"loss": np.array(np.nan)}
    (first, *_) = compare(outcome(**nan), outcome(**nan), AXES, floor=1e-6)
    assert first.error == np.inf


def test_anything_where_the_oracle_has_zero_is_infinitely_wrong():
    assert worst(outcome(**{"statistics dropped": np.array(1)})).error == np.inf


def test_rounding_of_a_gradient_that_is_zero_is_measured_against_all_gradients():
    zero, noise = ({"gradient key/bias": np.array([v, -v])} for v in (0.0, 1e-15))
    differences = compare(outcome(**noise), outcome(**zero), AXES, floor=1e-6)
    assert max(d.error for d in differences) == pytest.approx(1e-15 / 1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("share", "is_found"), [(0.004, True), (1e-4, True), (1e-9, False)])
def test_a_small_expert_without_a_gradient_is_found_in_any_dtype(dtype, share, is_found):
    largest = {"gradient head": np.ones(2)}
    right = outcome(**largest, **{"gradient experts/gate": np.array([[[1.0, 1.0], [share, 0.0]]])})
    lost = outcome(**largest, **{"gradient experts/gate": np.array([[[1.0, 1.0], [0.0, 0.0]]])})
    differences = compare(lost, right, AXES, floor=FLOORS[dtype])
    wrong = [(d.name, d.expert) for d in differences if d.error > TOLERANCES[dtype]]
    assert wrong == ([("gradient experts/gate", 1)] if is_found else [])


def test_rounding_of_what_is_no_expert_has_the_higher_floor():
    noise = outcome(**{"gradient key/bias": np.full(2, 2e-4), "gradient head": np.ones(2)})
    zero = outcome(**{"gradient key/bias": np.zeros(2), "gradient head": np.ones(2)})
    del noise["gradient experts/gate"], zero["gradient experts/gate"]
    differences = compare(noise, zero, AXES, floor=FLOORS["bfloat16"])
    assert max(d.error for d in differences) == pytest.approx(0.02)


def test_a_missing_or_reshaped_tensor_is_named():
    missing = outcome()
    del missing["gradient head"]
    assert worst(missing).name == "gradient head"
    assert worst(outcome(**{"gradient head": np.ones(3)})).error == np.inf
