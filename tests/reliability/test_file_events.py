"""The watcher of files sees what it must count, or the rig would kill where nothing happens."""

import sys

import pytest

from tests.reliability.file_events import FileEvents

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="inotify is Linux's")


def test_it_counts_what_is_made_written_renamed_and_deleted_in_new_folders_too(tmp_path):
    with FileEvents(tmp_path) as events:
        assert events.read() == 0
        (tmp_path / "a").mkdir()
        assert events.read() == 1
        (tmp_path / "a" / "file").write_text("x")  # made, written, closed
        assert events.read() == 3
        (tmp_path / "a" / "file").rename(tmp_path / "b")  # from and to
        assert events.read() == 2
        (tmp_path / "b").unlink()
        assert events.read() == 1
        (tmp_path / "c" / "d").mkdir(parents=True)
        assert events.read() >= 2


def test_it_counts_within_folders_of_one_name_alone(tmp_path):
    with FileEvents(tmp_path, within="checkpoints") as events:
        (tmp_path / "metrics").write_text("x")
        (tmp_path / "checkpoints").mkdir()
        assert events.read() == 0
        (tmp_path / "checkpoints" / "step").mkdir()
        assert events.read() == 1
        (tmp_path / "checkpoints" / "step" / "file").write_text("")
        assert events.read() >= 1
