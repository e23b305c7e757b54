"""Checkpoints that are written and read slice by slice."""

import errno
import os
import pathlib
import shutil
import threading
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts

from moejax.errors import UserError
from moejax.train import fingerprint, slices
from moejax.train.checkpoint import Checkpointer
from moejax.train.fingerprint import digits, fingerprints, run_words
from moejax.train.layout import one_device
from moejax.train.slices import StoredSlices, write_checkpoint

BF16 = np.dtype(ml_dtypes.bfloat16)


class Array:
    """A leaf to be written, which records what was asked of it."""

    def __init__(self, path, values):
        self.path, self.values, self.asked = path, values, []
        self.shape, self.dtype = values.shape, values.dtype

    def __getitem__(self, index):
        self.asked.append(index)
        return self.values[index]


def leaves():
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    return [
        Array("params/layers_0/ffn/experts/gate", normal(3, 4, 8, 16).astype(BF16)),
        Array("params/layers_0/norm/scale", normal(3, 8)),
        Array("params/head/kernel", normal(8, 24).astype(np.float16)),
        Array("params/zeros", np.zeros((2, 3, 5), np.float32)),
        Array("params/minus_zeros", -np.zeros((2, 3, 5), np.float32)),
    ]


@pytest.fixture
def written(tmp_path, monkeypatch):
    monkeypatch.setattr(slices, "_SLICE_BYTES", 300)
    found = leaves()
    directory = tmp_path / "step_00000007"
    num_bytes = write_checkpoint(directory, found, step=7, extra={"layers": {"layers_0": [0, 1]}})
    assert num_bytes == sum(leaf.values.nbytes for leaf in found)
    return tmp_path, found


def test_the_checkpointer_reads_what_was_written_in_slices(written):
    folder, found = written
    wanted = {x.path: jax.ShapeDtypeStruct(x.shape, x.dtype) for x in found}
    with Checkpointer(str(folder)) as store:
        restored = store.restore_leaves(one_device(wanted))
        assert store.manifest(7).extra == {"layers": {"layers_0": [0, 1]}}
    assert restored.step == 7
    for leaf in found:
        value = np.asarray(restored.state[leaf.path])
        assert value.dtype == leaf.dtype
        np.testing.assert_array_equal(value.view(np.uint8), leaf.values.view(np.uint8))


def test_large_leaves_are_asked_for_in_slices(written):
    asked = {leaf.path: leaf.asked for leaf in written[1]}
    assert len(asked["params/layers_0/ffn/experts/gate"]) == 12  # 256 bytes each
    assert asked["params/head/kernel"] == [()]


def test_slices_of_what_the_checkpointer_saved(tmp_path):
    tree = {leaf.path: jnp.asarray(leaf.values) for leaf in leaves()}
    with Checkpointer(str(tmp_path)) as store:
        store.save(3, tree, {})
        store.wait()
        stored = store.manifest(3).leaves
        folder = pathlib.Path(store.directory.path(3))
    for path, values in tree.items():
        leaf = StoredSlices(folder, path, stored[path])
        assert (leaf.shape, leaf.dtype) == (values.shape, values.dtype)
        rows = np.stack([leaf[(row,)] for row in range(values.shape[0])])
        np.testing.assert_array_equal(rows, values)
        leaf.check()


def test_a_flipped_bit_and_a_slice_not_read_are_noticed(written):
    folder, found = written
    with Checkpointer(str(folder)) as store:
        stored = store.manifest(7).leaves
    leaf = stored[found[0].path]
    changed = StoredSlices(folder / "step_00000007", found[1].path, stored[found[1].path])
    changed._fingerprint = leaf.fingerprint
    changed[()]
    with pytest.raises(UserError, match="norm/scale is not what was saved"):
        changed.check()
    half = StoredSlices(folder / "step_00000007", found[0].path, leaf)
    half[(0,)]
    with pytest.raises(ValueError, match="128|512|elements"):
        half.check()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "bool", "uint32", "float64"])
@pytest.mark.parametrize("block", [1024, 2048, 2**20])
def test_words_of_runs_add_up_to_the_fingerprint(monkeypatch, dtype, block):
    monkeypatch.setattr(fingerprint, "_BLOCK", block)
    values = np.random.default_rng(1).standard_normal((3, 4, 500)).astype(jnp.dtype(dtype))
    with jax.enable_x64(dtype == "float64"):
        whole = fingerprints({"x": jnp.asarray(values)})["x"]
    for parts in (values.reshape(1, -1), values.reshape(3, -1), values.reshape(12, -1)):
        words = sum(run_words(x, i * x.size) for i, x in enumerate(parts))
        assert digits(words.astype(np.uint32)) == whole


class _Slow:
    """An array whose writes end when the test says so."""

    def __init__(self):
        self.promises = []

    def write(self, values, **_):
        promise, future = ts.Promise.new()
        self.promises.append(promise)
        return future


def test_no_more_bytes_are_in_flight_than_allowed():
    array, writes = _Slow(), slices._Writes(limit=20)
    for _ in range(2):
        writes.start(array, np.zeros(10, np.uint8))
    third = threading.Thread(target=writes.start, args=(array, np.zeros(15, np.uint8)))
    third.start()
    array.promises[0].set_result(None)
    third.join(timeout=0.2)
    assert third.is_alive()
    assert len(array.promises) == 2
    array.promises[1].set_result(None)
    third.join(timeout=10)
    assert len(array.promises) == 3
    waiting = threading.Thread(target=writes.wait)
    waiting.start()
    waiting.join(timeout=0.2)
    assert waiting.is_alive()
    array.promises[2].set_result(None)
    waiting.join(timeout=10)
    assert not waiting.is_alive()


def test_a_slice_above_the_limit_is_written_alone():
    array, writes = _Slow(), slices._Writes(limit=5)
    writes.start(array, np.zeros(50, np.uint8))
    assert len(array.promises) == 1


def test_a_write_that_failed_stops_the_next_and_the_wait():
    array, writes = _Slow(), slices._Writes(limit=20)
    writes.start(array, np.zeros(10, np.uint8))
    array.promises[0].set_exception(OSError("no space left"))
    with pytest.raises(OSError, match="no space left"):
        writes.start(array, np.zeros(10, np.uint8))
    with pytest.raises(OSError, match="no space left"):
        writes.wait()


def test_a_checkpoint_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(slices, "_SLICE_BYTES", 300)
    opened = slices._open

    def in_the_way(state, path, context, create=None):
        array = opened(state, path, context, create)
        shutil.rmtree(state)
        state.touch()  # a file where the folder was
        return array

    monkeypatch.setattr(slices, "_open", in_the_way)
    with pytest.raises(ValueError, match="Error writing"):
        write_checkpoint(tmp_path / "step", leaves()[:1], step=0, extra={})
    assert not (tmp_path / "step" / "manifest").exists()


def test_nothing_is_written_any_more_after_an_error(tmp_path, monkeypatch):
    """Else files would appear in a folder that is being removed."""
    monkeypatch.setattr(slices, "_SLICE_BYTES", 300)
    end, started, ended = slices._Writes._end, [], []

    def slow(writes, num_bytes, error):
        time.sleep(0.3)
        ended.append(num_bytes)
        end(writes, num_bytes, error)

    class Failing(Array):
        def __getitem__(self, index):
            if index == (2, 3):
                raise OSError("the source is gone")
            started.append(index)
            return super().__getitem__(index)

    monkeypatch.setattr(slices._Writes, "_end", slow)
    failing = Failing("params/a", leaves()[0].values)
    with pytest.raises(OSError, match="the source is gone"):
        write_checkpoint(tmp_path / "step", [failing], step=0, extra={})
    assert len(ended) == len(started) > 0


class Disk:
    """Records which files were sent to the disk and dropped from the page cache."""

    def __init__(self, monkeypatch, error=None):
        self.sent, self.dropped, self.first = set(), set(), threading.Event()
        self.error = error
        monkeypatch.setattr(slices, "_SLICE_BYTES", 300)
        monkeypatch.setattr(slices, "_FILE_BYTES", 1000)
        monkeypatch.setattr(os, "fsync", self.fsync)
        drop = lambda file, *_: self.dropped.add(os.fstat(file).st_ino)
        monkeypatch.setattr(os, "posix_fadvise", drop, raising=False)

    def fsync(self, file):
        self.sent.add(os.fstat(file).st_ino)
        self.first.set()
        error, self.error = self.error, None  # as Linux, which tells of it once
        if error:
            raise error

    def leaf(self):
        """One whose last slice is there once a file was sent to the disk."""
        leaf = leaves()[0]
        disk, last = self, tuple(size - 1 for size in leaf.shape[:2])

        class Late(Array):
            def __getitem__(self, index):
                assert index != last or disk.first.wait(60), "no file was sent to the disk"
                return super().__getitem__(index)

        return Late(leaf.path, leaf.values)


def test_files_go_to_the_disk_while_others_are_made_and_leave_the_page_cache(tmp_path, monkeypatch):
    disk = Disk(monkeypatch)
    write_checkpoint(tmp_path / "step", [disk.leaf()], step=0, extra={})
    files = {path.stat().st_ino for path in (tmp_path / "step").rglob("*") if path.is_file()}
    assert files <= disk.sent
    assert files <= disk.dropped


def test_an_error_of_the_disk_is_not_lost(tmp_path, monkeypatch):
    disk = Disk(monkeypatch, OSError(errno.EIO, "the disk is broken"))
    with pytest.raises(OSError, match="the disk is broken"):
        write_checkpoint(tmp_path / "step", [disk.leaf()], step=0, extra={})
