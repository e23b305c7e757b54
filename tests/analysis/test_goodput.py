"""Where a run's time went: lost steps, pauses, and the line at the end."""

import json

import pytest

from moejax.analysis.goodput import GOODPUT, Session, duration, goodput, read_sessions
from moejax.errors import UserError


def session(start, last, **changed):
    seconds = {"start": 5.0, "compile": 10.0, "step": 1.0 * (last - start), "save": 2.0}
    return Session(**({"start": start, "last": last, "seconds": seconds} | changed))


def test_one_session_loses_nothing():
    found = goodput([session(0, 100, ended="finished")])
    assert (found.productive, found.lost, found.down) == (100, 0, 0)
    assert found.total == 117
    assert found.line() == (
        "goodput 85.5% of 1 min 57 s in 1 session: productive 1 min 40 s, compile 10.0 s, "
        "save 2.0 s, other 5.0 s"
    )


def test_steps_that_a_restart_repeats_are_lost_and_the_time_between_is_down():
    found = goodput([session(0, 100), session(80, 130, down=60.0)])
    assert (found.productive, found.lost, found.down) == (130, 20, 60)
    assert found.total == 2 * 17 + 150 + 60
    assert found.figures()["lost"] == "20.0 s"


def test_a_restart_from_an_older_checkpoint_loses_all_sessions_after_it():
    found = goodput([session(0, 100), session(100, 200), session(50, 60)])
    assert (found.productive, found.lost) == (60, 150)


def test_a_second_restart_does_not_lose_the_same_steps_twice():
    sessions = [session(0, 100), session(80, 90), session(80, 120)]
    found = goodput(sessions)
    assert (found.productive, found.lost) == (120, 30)


@pytest.mark.parametrize(
    ("ended", "down"), [("--until 5", 0), ("finished", 0), ("SIGTERM", 60), ("", 60)]
)
def test_a_pause_that_was_asked_for_is_not_down(ended, down):
    found = goodput([session(0, 5, ended=ended), session(5, 6, down=60.0)])
    assert found.down == down


def test_nothing_yet():
    assert goodput([session(0, 0, seconds={})]).line().startswith("goodput 0.0% of 0.0 s")


def test_no_account_and_a_damaged_one(tmp_path):
    assert read_sessions(tmp_path) == []
    for text in ("{", "[]", json.dumps({"sessions": [{"start": 1}]})):
        (tmp_path / GOODPUT).write_text(text)
        with pytest.raises(UserError, match="cannot be read"):
            read_sessions(tmp_path)


def test_durations():
    assert [duration(s) for s in (7.34, 65, 3600 + 720)] == ["7.3 s", "1 min 5 s", "1 h 12 min"]
