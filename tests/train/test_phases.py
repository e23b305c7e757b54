"""Phases as a clock: exclusive seconds, own work, and what is told."""

import json

import pytest

from moejax.train import phases
from moejax.train.phases import Phases


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def told():
    return []


@pytest.fixture
def here(clock, told):
    return Phases(lambda line: told.append(json.loads(line)), clock)


def test_inner_phases_are_not_part_of_outer_ones(here, clock):
    clock.now += 1
    with here.phase("save", 5):
        clock.now += 2
        with here.phase("evaluate"):
            clock.now += 4
        clock.now += 8
    clock.now += 16
    found = here.seconds()
    assert (found["start"], found["save"], found["evaluate"]) == (17, 10, 4)
    assert sum(found.values()) == 31


def test_an_error_leaves_the_phase(here, clock):
    with pytest.raises(KeyError), here.phase("save"):
        raise KeyError
    clock.now += 3
    assert here.seconds()["start"] == 3


def test_every_change_is_told_and_counted(here, told):
    with here.phase("data", 3):
        pass
    here.enter("step", 4)
    assert [(t["phase"], t["step"], t["count"]) for t in told] == [
        ("data", 3, 1),
        ("start", 3, 2),
        ("step", 4, 3),
    ]


def test_own_work_is_what_steps_take_without_waiting(here, clock):
    here.enter("compile")
    clock.now += 50
    here.enter("step", 1)
    clock.now += 1
    with here.phase("data", 2):
        clock.now += 2
    with here.waiting():
        clock.now += 7
    with here.phase("save", 2):
        clock.now += 30
    assert here.own_work() == 3


def test_a_phase_that_does_not_exist_is_an_error(here):
    with pytest.raises(ValueError, match="'pause' is no phase"):
        here.enter("pause")


def test_without_a_watchdog_nothing_is_told(monkeypatch):
    monkeypatch.delenv("MOEJAX_WATCHDOG_PIPE", raising=False)
    monkeypatch.setattr(phases, "_current", phases.current())
    phases.begin()
    assert phases.enter("step", 2) == "start"


def test_it_decorates(monkeypatch, clock):
    monkeypatch.setattr(phases, "_current", Phases(now=clock))

    @phases.phase("restore")
    def restore(seconds):
        clock.now += seconds

    restore(2)
    restore(3)
    assert phases.current().seconds()["restore"] == 5
