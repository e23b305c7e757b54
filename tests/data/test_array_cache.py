import errno
import logging
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from moejax.data import DataError
from moejax.data import cache as cache_module
from moejax.data.cache import open_or_build


class Builds:
    """Counts how often it was called."""

    def __init__(self, size=1000):
        self.calls, self.size = 0, size

    def __call__(self, writer):
        self.calls += 1
        for part in np.array_split(np.arange(self.size, dtype=np.int32), 3):
            writer.append("a", part)
        writer.append("b", np.array([7], np.uint16))
        return {"calls": self.calls}


def entry(tmp_path, build, fingerprint="f"):
    return open_or_build(tmp_path / "x" / "entry", fingerprint, build, what="the thing")


def test_built_once_then_mapped_read_only(tmp_path):
    build = Builds()
    for _ in range(3):
        arrays, info = entry(tmp_path, build)
        np.testing.assert_array_equal(arrays["a"], np.arange(1000))
        assert arrays["a"].dtype == np.int32
        assert info == {"calls": 1}
        assert not arrays["a"].flags.writeable
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["entry"]


@pytest.mark.parametrize(
    "damage",
    ["flip", "truncate", "extend", "delete", "no_meta", "half_meta", "edit_meta", "empty"],
)
def test_damage_is_noticed_and_mended(tmp_path, caplog, damage):
    build = Builds()
    entry(tmp_path, build)
    folder = tmp_path / "x" / "entry"
    file, meta = folder / "a.bin", folder / "meta.json"
    raw = file.read_bytes()
    if damage == "flip":
        file.write_bytes(raw[:1234] + bytes([raw[1234] ^ 4]) + raw[1235:])
    elif damage == "truncate":
        file.write_bytes(raw[:-4])
    elif damage == "extend":
        file.write_bytes(raw + raw[:4])
    elif damage == "delete":
        file.unlink()
    elif damage == "no_meta":
        meta.unlink()
    elif damage == "half_meta":
        meta.write_text(meta.read_text()[:50])
    elif damage == "edit_meta":
        meta.write_text(meta.read_text().replace('"calls": 1', '"calls": 3'))
    elif damage == "empty":
        for f in folder.iterdir():
            f.unlink()
    with caplog.at_level(logging.WARNING):
        arrays, info = entry(tmp_path, build)
    assert info == {"calls": 2}
    np.testing.assert_array_equal(arrays["a"], np.arange(1000))
    assert "the thing" in caplog.text
    assert "damaged" in caplog.text
    caplog.clear()
    assert entry(tmp_path, build)[1] == {"calls": 2}
    assert not caplog.records


def test_another_fingerprint_is_stale(tmp_path, caplog):
    build = Builds()
    entry(tmp_path, build)
    assert entry(tmp_path, build, "g")[1] == {"calls": 2}
    assert "stale" in caplog.text


def test_a_flip_anywhere_is_noticed_in_a_file_of_many_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "BLOCK_BYTES", 64)
    build = Builds()
    entry(tmp_path, build)
    file = tmp_path / "x" / "entry" / "a.bin"
    for at in (0, 63, 64, 2000, 3999):
        raw = bytearray(file.read_bytes())
        raw[at] ^= 1
        file.write_bytes(raw)
        calls = build.calls
        entry(tmp_path, build)
        assert build.calls == calls + 1


def test_very_large_files_are_checked_by_sample_with_both_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "BLOCK_BYTES", 64)
    monkeypatch.setattr(cache_module, "MAX_BLOCKS_CHECKED", 8)
    build = Builds()
    entry(tmp_path, build)
    file = tmp_path / "x" / "entry" / "a.bin"
    entry(tmp_path, build)
    assert build.calls == 1
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    entry(tmp_path, build)
    assert build.calls == 2


def test_a_failed_build_leaves_nothing(tmp_path):
    def build(writer):
        writer.append("a", np.zeros(5))
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        entry(tmp_path, build)
    assert list((tmp_path / "x").iterdir()) == []


_CHILD = """
import pathlib, sys, time
import numpy as np
from moejax.data.cache import open_or_build

def build(writer):
    writer.append("a", np.arange(5))
    print("building", flush=True)
    sys.stdin.readline()
    return {}

open_or_build(pathlib.Path(sys.argv[1]) / "x" / "theirs", "f", build, what="theirs")
"""


@pytest.fixture
def child(tmp_path):
    """Another process in the middle of a build; a line on its stdin lets it go on."""
    process = subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=pathlib.Path(__file__).parents[2],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert process.stdout.readline() == "building\n"
    yield process
    process.kill()
    process.communicate()


def names(tmp_path):
    return sorted(p.name.split("-")[0] for p in (tmp_path / "x").iterdir())


def test_what_a_killed_build_has_left_goes_with_the_next_one(tmp_path, child):
    assert names(tmp_path) == [".building"]
    child.kill()
    child.wait()
    assert names(tmp_path) == [".building"]
    entry(tmp_path, Builds())
    assert names(tmp_path) == ["entry"]


def test_the_build_of_a_living_process_is_not_touched(tmp_path, child):
    for fingerprint in ("f", "g"):
        entry(tmp_path, Builds(), fingerprint)
    assert names(tmp_path) == [".building", "entry"]
    child.communicate("go on\n", timeout=60)
    assert child.returncode == 0
    assert names(tmp_path) == ["entry", "theirs"]


@pytest.mark.parametrize("owner", ["another-machine", None])
def test_what_may_belong_to_a_living_process_elsewhere_stays(tmp_path, owner):
    workspace = tmp_path / "x" / ".building-theirs-1"
    workspace.mkdir(parents=True)
    if owner is not None:
        (workspace / "owner").write_text(owner)
    entry(tmp_path, Builds())
    assert names(tmp_path) == [".building", "entry"]


def test_without_locks_a_build_works_and_is_never_taken_for_abandoned(tmp_path, monkeypatch):
    def unsupported(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    def build(writer):
        with monkeypatch.context() as patch:  # the other process finds locks that work
            patch.setattr(cache_module.fcntl, "flock", working)
            open_or_build(tmp_path / "x" / "other", "f", Builds(), what="the other")
        return Builds()(writer)

    working = cache_module.fcntl.flock
    monkeypatch.setattr(cache_module.fcntl, "flock", unsupported)
    entry(tmp_path, build)
    assert names(tmp_path) == ["entry", "other"]


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "x").write_text("a file in the way")
    with pytest.raises(DataError, match="cannot write the thing.*MOEJAX_CACHE") as e:
        entry(tmp_path, Builds())
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOSPC])
def test_a_read_only_or_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch, code):
    build = Builds()
    text = OSError(code, "no").strerror

    def failing(self, name, values):
        raise OSError(code, text)

    monkeypatch.setattr(cache_module.ArrayWriter, "append", failing)
    with pytest.raises(DataError, match="cannot write the thing.*room"):
        entry(tmp_path, build)
    assert list((tmp_path / "x").iterdir()) == []


def test_a_valid_entry_is_used_where_nothing_can_be_written(tmp_path, monkeypatch):
    build = Builds()
    entry(tmp_path, build)

    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(pathlib.Path, "mkdir", refuse)
    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    assert entry(tmp_path, build)[1] == {"calls": 1}
