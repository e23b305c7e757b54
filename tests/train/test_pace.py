"""The straggler among processes, here threads' worth of numbers without any process."""

import json
import math

import pytest

from moejax.train import pace, phases, processes
from moejax.train.pace import Pace
from moejax.train.phases import Phases


class Board:
    """What several processes have left with the coordination service."""

    def __init__(self):
        self.left = {}

    def publish(self, process, place, text):
        assert (place, process) not in self.left
        self.left[place, process] = text

    def take(self, place):
        found = {p: t for (at, p), t in self.left.items() if at == place}
        self.left = {key: t for key, t in self.left.items() if key[0] != place}
        return found


@pytest.fixture
def run(monkeypatch):
    """Runs records of four processes; `work(process, record)` gives own seconds and waiting."""
    board = Board()
    monkeypatch.setattr(processes, "num_processes", lambda: 4)
    monkeypatch.setattr(processes, "take_published", board.take)

    def start(work, num_records, *, steps=10):
        clocks, found = {}, []
        for process in range(4):
            now = [0.0]
            clocks[process] = now, Phases(now=lambda now=now: now[0]), Pace()
            clocks[process][1].enter("step", 0)
        for record in range(num_records):
            for process in (1, 2, 3, 0):  # the first one comes last
                now, here, mine = clocks[process]
                own, waiting = work(process, record)
                for _ in range(steps):
                    now[0] += own
                    with here.waiting():
                        now[0] += waiting
                with monkeypatch.context() as patch:
                    patch.setattr(phases, "_current", here)
                    patch.setattr(processes, "is_first", lambda process=process: process == 0)
                    patch.setattr(pace.socket, "gethostname", lambda process=process: f"n{process}")
                    patch.setattr(
                        processes,
                        "publish",
                        lambda at, text, process=process: board.publish(process, at, text),
                    )
                    values = mine.take(steps * (record + 1))
                    assert not values or process == 0
                    if process == 0:
                        found.append((values, mine.warnings()))
        return found, board

    return start


def slow(process, record):
    return (0.21, 0.0) if process == 3 else (0.012, 0.198)


def test_the_slowest_is_named_once_with_its_host(run):
    found, board = run(slow, 6)
    assert [values for values, _ in found[:2]] == [{}, {}]
    for values, _ in found[2:]:
        assert values["own_work_ms"] == pytest.approx([12, 12, 12, 210])
    text = "slowest: process 3 (host n3): 210 ms of its own work per step, median 12 ms"
    assert [texts for _, texts in found] == [[], [], [text], [], [], []]
    assert {at for at, _ in board.left} == {"pace/5"}  # the others are deleted


def test_another_straggler_or_a_much_slower_one_is_named_again(run):
    def work(process, record):
        slowest, seconds = {0: (3, 0.2), 1: (3, 0.2), 2: (3, 0.5), 3: (1, 0.1)}[min(record, 3)]
        return (seconds, 0.0) if process == slowest else (0.01, seconds - 0.01)

    found, _ = run(work, 6)
    texts = [text.split(" ms")[0] for _, texts in found for text in texts]
    assert texts == [
        "slowest: process 3 (host n3): 200",
        "slowest: process 3 (host n3): 500",
        "slowest: process 1 (host n1): 100",
    ]


@pytest.mark.parametrize(
    ("own", "waiting"),
    [(0.004, 0.0), (0.02, 2.0)],  # a few ms; more, but a small part of the step
)
def test_what_does_not_matter_is_not_said(run, own, waiting):
    found, _ = run(lambda p, _: (own if p == 3 else 0.001, waiting), 4)
    assert not [text for _, texts in found for text in texts]


def test_a_process_that_has_not_come_as_far_is_nan_and_nobody_waits(monkeypatch):
    board = Board()
    board.left = {("pace/1", 2): json.dumps(["n2", 0.03])}
    monkeypatch.setattr(processes, "num_processes", lambda: 3)
    monkeypatch.setattr(processes, "take_published", board.take)
    monkeypatch.setattr(processes, "publish", lambda *_: None)
    here = Pace()
    assert here.take(10) == here.take(20) == {}
    first, second, third = here.take(30)["own_work_ms"]
    assert third == pytest.approx(30)
    assert math.isfinite(first)
    assert math.isnan(second)


def test_alone_it_is_measured_and_nobody_is_named():
    mine = Pace()
    assert mine.take(1) == mine.take(2) == {}
    values = mine.take(3)
    assert len(values["own_work_ms"]) == 1
    assert mine.warnings() == []
