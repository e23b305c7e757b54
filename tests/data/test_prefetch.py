import threading
import time

import pytest

from moejax.data.prefetch import Prefetch


def threads():
    return [t for t in threading.enumerate() if t.name == "moejax-data"]


def test_order_and_end():
    assert list(Prefetch(lambda i: i * i, start=3, stop=9)) == [9, 16, 25, 36, 49, 64]
    assert list(Prefetch(lambda i: i, start=3, stop=3)) == []
    assert not threads()


def test_works_ahead_but_not_further_than_its_depth():
    made = []
    with Prefetch(lambda i: made.append(i) or i, start=0, depth=2) as values:
        deadline = time.monotonic() + 5
        while len(made) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert made == [0, 1, 2]  # two in the queue, one waiting to be put
        assert [next(values) for _ in range(5)] == [0, 1, 2, 3, 4]


def test_an_error_comes_at_its_place_and_ends_it():
    def make(i):
        if i == 2:
            raise OSError("the disk is gone")
        return i

    values = Prefetch(make, start=0)
    assert [next(values), next(values)] == [0, 1]
    with pytest.raises(OSError, match="the disk is gone"):
        next(values)
    with pytest.raises(StopIteration):
        next(values)
    assert not threads()


def test_close_stops_the_thread_at_any_time():
    for taken in (0, 1, 7):
        values = Prefetch(lambda i: i, start=0)
        for _ in range(taken):
            next(values)
        values.close()
        values.close()
        assert not threads()
        with pytest.raises(StopIteration):
            next(values)
