"""The account of a run's time in its folder, across sessions that end in different ways."""

import os

import pytest

from moejax.analysis.goodput import GOODPUT, goodput, read_sessions
from moejax.train import ledger, phases
from moejax.train.ledger import Ledger
from moejax.train.phases import Phases


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def begin(monkeypatch):
    """Begins a session that has been up for so many seconds; returns its clock."""

    def start(up):
        clock = Clock()
        monkeypatch.setattr(phases, "_current", Phases(now=clock))
        clock.now = up
        return clock

    return start


def test_sessions_follow_each_other(tmp_path, begin):
    clock = begin(3.0)
    first = Ledger(tmp_path, 0)
    phases.enter("step", 0)
    clock.now += 10
    first.update(10)
    clock.now += 99  # killed: nobody hears of it

    path = tmp_path / GOODPUT
    written = path.stat().st_mtime
    os.utime(path, (written - 50, written - 50))
    clock = begin(4.0)
    second = Ledger(tmp_path, 8)
    phases.enter("step", 8)
    clock.now += 6
    second.update(12, ended="finished")

    one, two = read_sessions(tmp_path)
    assert (one.start, one.last, one.seconds["step"], one.ended) == (0, 10, 10, "")
    assert (two.start, two.last, two.seconds["step"], two.ended) == (8, 12, 6, "finished")
    assert one.down == 0
    assert two.down == pytest.approx(50 - 4, abs=5)  # what was there, less what this one is up
    found = goodput([one, two])
    assert (found.productive, found.lost) == (14, 2)


def test_a_clock_that_goes_back_counts_nothing(tmp_path, begin):
    begin(1.0)
    Ledger(tmp_path, 0)
    os.utime(tmp_path / GOODPUT, (2**32, 2**32))
    begin(1.0)
    Ledger(tmp_path, 0)
    assert read_sessions(tmp_path)[1].down == 0


def test_a_damaged_account_is_a_warning_and_begins_anew(tmp_path, begin, caplog):
    (tmp_path / GOODPUT).write_text("{")
    begin(1.0)
    Ledger(tmp_path, 5).update(6)
    assert "the account of earlier sessions is lost" in caplog.text
    assert [s.last for s in read_sessions(tmp_path)] == [6]


def test_where_it_cannot_be_written_the_run_goes_on(tmp_path, begin, caplog):
    begin(1.0)
    Ledger(tmp_path / "missing", 0).update(3)
    assert "cannot be written" in caplog.text


def test_the_first_process_alone_writes(tmp_path, begin, monkeypatch):
    monkeypatch.setattr(ledger.processes, "is_first", lambda: False)
    begin(1.0)
    Ledger(tmp_path, 0).update(3)
    assert not list(tmp_path.iterdir())
