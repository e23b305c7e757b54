"""Two runs in one folder: the later one goes on, the earlier one stops and destroys nothing."""

import json
import os
import pathlib
import time

import pytest
from saved_state import abstract, make_state, restored_step

from moejax.errors import UserError
from moejax.train.checkpoint import Checkpointer
from moejax.train.retention import Keep
from moejax.train.writer_token import FILE, WriterToken
from moejax.train.writers import JsonLines


def save(checkpointer, step):
    checkpointer.save(step, make_state(step), {"position": step})
    checkpointer.wait()


def content(directory):
    return sorted(str(path) for path in pathlib.Path(directory).rglob("*"))


def test_the_earlier_writer_stops_at_its_next_save_and_touches_nothing(tmp_path):
    with Checkpointer(tmp_path) as first, Checkpointer(tmp_path) as second:
        first.start_writing()
        save(first, 10)
        second.start_writing()
        second.restore(abstract(make_state()))
        (tmp_path / "step_00000020.orbax-checkpoint-tmp").mkdir()  # what the later one is writing
        before = content(tmp_path)
        with pytest.raises(
            UserError, match=r"another run now writes to .*\(process \d+ on .*alone"
        ):
            first.save(20, make_state(20), {"position": 20})
        assert content(tmp_path) == before
        save(second, 20)
        assert second.steps() == [10, 20]
    assert restored_step(tmp_path)[0] == 20


def test_a_save_that_ends_after_the_takeover_deletes_nothing(tmp_path):
    with Checkpointer(tmp_path, Keep(last=1)) as first, Checkpointer(tmp_path) as second:
        first.start_writing()
        save(first, 10)
        first.save(20, make_state(20), {"position": 20})
        second.start_writing()
        first.wait()
        assert first.steps() == [10, 20]  # by its own rule 10 would go


def test_a_save_that_the_later_run_cleared_says_why_it_failed(tmp_path, monkeypatch):
    with Checkpointer(tmp_path) as first:
        first.start_writing()
        monkeypatch.setattr(first._store, "wait", lambda: (_ for _ in ()).throw(OSError("gone")))
        with Checkpointer(tmp_path) as second:
            second.start_writing()
            (tmp_path / "step_00000020.orbax-checkpoint-tmp").mkdir()
            with pytest.raises(UserError, match="another run now writes"):
                first.wait()
            assert (tmp_path / "step_00000020.orbax-checkpoint-tmp").exists()
        monkeypatch.undo()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"token": "x"}'])
def test_a_token_that_cannot_be_read_is_not_ours(tmp_path, text):
    token = WriterToken(Checkpointer(tmp_path).directory.root)
    token.check()  # nobody has taken anything
    token.take()
    token.check()
    (tmp_path / FILE).write_text(text)
    with pytest.raises(UserError, match="cannot be read"):
        token.check()
    (tmp_path / FILE).unlink()
    with pytest.raises(UserError, match="somebody who removed"):
        token.check()


def test_what_a_killed_run_left_is_in_nobodys_way_whatever_the_clocks_say(tmp_path):
    """A stale token, and times of files from the future and from the past."""
    with Checkpointer(tmp_path, Keep(last=None)) as killed:
        killed.start_writing()
        for step in (10, 20, 30):
            save(killed, step)
    described = {"token": "0" * 32, "host": "a-machine-that-is-gone", "process": 1}
    (tmp_path / FILE).write_text(json.dumps(described))
    for days, step in ((4000, 10), (-4000, 20), (0, 30)):
        when = time.time() + days * 86400
        for path in (tmp_path / f"step_{step:08d}", tmp_path / FILE):
            os.utime(path, (when, when))
    assert restored_step(tmp_path)[0] == 30
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.start_writing()
        checkpointer.restore(abstract(make_state()))
        save(checkpointer, 40)
        assert checkpointer.steps()[-1] == 40


def test_records_of_the_earlier_run_do_not_reach_the_later_ones_file(tmp_path):
    record = lambda step: {"kind": "train", "step": step, "time": 0.0, "values": {"loss": 1.0}}
    earlier = JsonLines(tmp_path / "metrics.jsonl", resume_step=0)
    earlier.write(record(1))
    later = JsonLines(tmp_path / "metrics.jsonl", resume_step=1)
    earlier.write(record(2))
    later.write(record(2))
    earlier.close()
    later.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
