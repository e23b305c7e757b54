"""The keep policy as a function of steps and metrics."""

import pytest

from moejax.errors import UserError
from moejax.train.retention import Keep


def test_keep_every_and_best():
    steps = [10, 20, 30, 40, 50]
    metrics = {10: {"loss": 3.0}, 20: {"loss": 1.0}, 30: {"loss": float("nan")}, 40: {"loss": 2.0}}
    assert Keep(last=1).wanted(steps, metrics) == {50}
    assert Keep(last=1, every=20).wanted(steps, metrics) == {20, 40, 50}
    assert Keep(last=1, best=2).wanted(steps, metrics) == {20, 40, 50}
    assert Keep(last=None).wanted(steps, {}) == set(steps)
    for wrong in ({"last": 0}, {"every": 0}, {"best": -1}):
        with pytest.raises(UserError):
            Keep(**wrong)


def test_superseded_steps_are_kept_until_the_new_timeline_has_as_many_as_it_falls_back_on():
    assert Keep(last=2).wanted_superseded({20, 30}, [10, 25]) == {20, 30}
    assert Keep(last=2).wanted_superseded({20, 30}, [10, 20, 25]) == {30}
    assert Keep(last=2).wanted_superseded({20, 30}, [10, 30, 31]) == set()
    assert Keep(last=1, every=10, best=3).wanted_superseded({20, 30}, [20]) == {30}
    assert Keep(last=None).wanted_superseded({20}, [30, 40, 50]) == {20}
