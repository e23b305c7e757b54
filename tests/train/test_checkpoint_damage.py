"""Damaged, unfinished and unwritable checkpoints: noticed, named, and nothing else is lost."""

import logging
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest
from saved_state import abstract, make_state, restored_step, save_steps

from moejax.errors import UserError
from moejax.train import array_store
from moejax.train.checkpoint import Checkpointer
from moejax.train.fingerprint import fingerprints
from moejax.train.manifest import CorruptCheckpoint


def data_files(directory, step):
    files = [f for f in (directory / f"step_{step:08d}").rglob("*") if f.is_file()]
    return sorted(files, key=lambda f: f.stat().st_size, reverse=True)


def flip_bit(file: pathlib.Path, where: float, bit: int = 3):
    content = bytearray(file.read_bytes())
    content[int(where * (len(content) - 1))] ^= 1 << bit
    file.write_bytes(content)


def test_one_flipped_bit_in_the_largest_file_is_named_and_the_one_before_is_used(tmp_path, caplog):
    save_steps(tmp_path, [10, 20])
    for file in data_files(tmp_path, 20):
        if file.stat().st_size > 100_000:
            flip_bit(file, 0.5)
    with caplog.at_level(logging.WARNING, "moejax"):
        step, problems = restored_step(tmp_path)
    assert step == 10
    assert len(problems) == 1
    assert "step 20" in problems[0]
    assert "/w" in problems[0] or "damaged" in problems[0]
    assert "step_00000020 is corrupt" in caplog.text


def test_fingerprint_names_the_leaf_that_orbax_restores_wrongly(tmp_path, monkeypatch):
    """The arrays come back changed and Orbax has seen nothing."""
    save_steps(tmp_path, [10, 20])
    read = array_store.ArrayStore.read

    def wrong(self, path, wanted):
        state = read(self, path, wanted)
        if path.name.endswith("20"):
            bits = jax.lax.bitcast_convert_type(state["params/w"], jnp.uint32)
            bits = bits.at[100, 7].set(bits[100, 7] ^ 1)
            state["params/w"] = jax.lax.bitcast_convert_type(bits, jnp.float32)
        return state

    monkeypatch.setattr(array_store.ArrayStore, "read", wrong)
    step, problems = restored_step(tmp_path)
    assert step == 10
    assert problems == ["step 20: the leaf params/w is not what was saved (1 differ)"]


@pytest.mark.parametrize(
    "where", [0.31, *(pytest.param(w, marks=pytest.mark.slow) for w in (0.0, 0.77, 1.0))]
)
def test_any_flipped_bit_in_any_file_is_noticed_or_harmless(tmp_path, where):
    """Never a different state in silence, whichever file it is."""
    save_steps(tmp_path, [10, 20])
    pristine = tmp_path / "pristine"
    shutil.copytree(tmp_path / "step_00000020", pristine)
    fallbacks = 0
    for file in data_files(tmp_path, 20):
        flip_bit(file, where, bit=5)
        step, problems = restored_step(tmp_path)  # compares every bit with the step it claims
        assert (step == 10) == bool(problems)
        fallbacks += step == 10
        shutil.copy(pristine / file.relative_to(tmp_path / "step_00000020"), file)
    assert fallbacks >= 2
    assert restored_step(tmp_path)[0] == 20


@pytest.mark.parametrize("damage", ["truncate", "delete"])
def test_truncated_or_missing_files(tmp_path, damage):
    save_steps(tmp_path, [10, 20])
    for file in data_files(tmp_path, 20):
        if file.stat().st_size > 100_000:
            if damage == "delete":
                file.unlink()
            else:
                os.truncate(file, file.stat().st_size // 2)
    step, problems = restored_step(tmp_path)
    assert step == 10
    assert len(problems) == 1
    assert "step 20: its files are damaged" in problems[0]
    assert len(problems[0]) < 300
    assert '"params/' in problems[0] or '"moments/' in problems[0]  # names a leaf


def test_flipped_digit_in_the_data_position_is_noticed(tmp_path):
    save_steps(tmp_path, [10, 20])
    file = tmp_path / "step_00000020/manifest/manifest.json"
    file.write_text(file.read_text().replace('"position": 20', '"position": 21'))
    step, problems = restored_step(tmp_path)
    assert step == 10
    assert problems == ["step 20: its manifest does not match its checksum"]


def test_unfinished_and_leftover_directories_do_not_count(tmp_path):
    save_steps(tmp_path, [10])
    (tmp_path / "step_00000030").mkdir()  # by a copy that was cut off
    for name in ("step_00000020.orbax-checkpoint-tmp", "step_00000005.deleting"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("half")
    (tmp_path / "notes").mkdir()
    step, problems = restored_step(tmp_path)
    assert step == 10
    assert problems == ["step 30: its manifest is missing or not readable"]
    assert (tmp_path / "step_00000005.deleting").exists()  # reading changes nothing
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.restore(abstract(make_state()))
        checkpointer.save(40, make_state(40), {"position": 40})
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["notes", "step_00000010", "step_00000030.superseded", "step_00000040"]


def test_all_corrupt_is_an_error_that_names_each(tmp_path):
    save_steps(tmp_path, [10, 20])
    for step in (10, 20):
        shutil.rmtree(tmp_path / f"step_{step:08d}" / "state")
    with (
        Checkpointer(tmp_path) as checkpointer,
        pytest.raises(UserError, match="no checkpoint .* can be used: step 20: .*step 10: "),
    ):
        checkpointer.restore(abstract(make_state()))


def test_an_explicit_step_never_falls_back(tmp_path):
    save_steps(tmp_path, [10, 20])
    (tmp_path / "step_00000020/manifest/manifest.json").write_text("{")
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.restore(abstract(make_state()), step=10).step == 10
        with pytest.raises(UserError, match="the checkpoint of step 20 is not usable"):
            checkpointer.restore(abstract(make_state()), step=20)
        with pytest.raises(CorruptCheckpoint):
            checkpointer.manifest(20)


def test_restoring_from_before_a_step_falls_back_and_never_looks_later(tmp_path):
    save_steps(tmp_path, [10, 20, 30])
    target = abstract(make_state())
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.restore(target, before=30).step == 20
        (tmp_path / "step_00000020/manifest/manifest.json").write_text("{")
        assert checkpointer.restore(target, before=30).step == 10
        assert checkpointer.problems == ["step 20: its manifest is not readable"]
        (tmp_path / "step_00000010/manifest/manifest.json").write_text("{")
        with pytest.raises(UserError, match="no checkpoint before step 30 .*step 20: .*step 10: "):
            checkpointer.restore(target, before=30)
        with pytest.raises(UserError, match="there is no checkpoint before step 5 in"):
            checkpointer.restore(target, before=5)


def test_half_a_deletion_of_what_was_set_aside_is_cleared(tmp_path):
    save_steps(tmp_path, [10])
    for name in ("step_00000005.superseded.deleting", "step_00000005.superseded.1.deleting"):
        (tmp_path / name).mkdir()
    save_steps(tmp_path, [20])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000010", "step_00000020"]


def test_empty_directory(tmp_path):
    with Checkpointer(tmp_path / "new") as checkpointer:
        assert checkpointer.steps() == []
        with pytest.raises(UserError, match="there is no checkpoint in"):
            checkpointer.restore(abstract(make_state()))
    assert not (tmp_path / "new").exists()


# ---- storage that refuses ------------------------------------------------------------------------


def steps_until_error(checkpointer):
    for _ in range(600):
        checkpointer.check_error()
        time.sleep(0.02)


def test_background_error_is_raised_by_check_error_and_nothing_saved_is_lost(tmp_path, caplog):
    """A real write error in Orbax's own thread: the file size limit of the process."""
    save_steps(tmp_path, [10])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpointer(tmp_path) as checkpointer:
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, limits[1]))
        try:
            checkpointer.save(20, make_state(20), {"position": 20})
            with pytest.raises(UserError, match="step 20 could not .*exceed.*steps: 10") as caught:
                steps_until_error(checkpointer)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert "\n" not in str(caught.value)
        assert "Traceback" not in caplog.text
        checkpointer.check_error()  # told once
        checkpointer.save(20, make_state(20), {"position": 20})  # not skipped: it never arrived
        checkpointer.wait()
        assert checkpointer.steps() == [10, 20]
    assert restored_step(tmp_path)[0] == 20
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000010", "step_00000020"]


@pytest.mark.parametrize(
    "code, words", [(28, "the disk is full"), (30, "file system is read-only")]
)
def test_error_when_a_save_starts(tmp_path, monkeypatch, code, words):
    save_steps(tmp_path, [10])

    def refuse(*args):
        raise OSError(code, os.strerror(code))

    with Checkpointer(tmp_path) as checkpointer:
        monkeypatch.setattr(array_store.ArrayStore, "write", refuse)
        with pytest.raises(UserError, match=f"step 20 could not be written .*{words}"):
            checkpointer.save(20, make_state(20), {"position": 20})
    assert restored_step(tmp_path)[0] == 10


def test_a_file_in_the_way_is_found_before_the_first_step(tmp_path):
    (tmp_path / "file").write_text("x")
    with Checkpointer(tmp_path / "file" / "run") as checkpointer:
        with pytest.raises(UserError, match="cannot write checkpoints to .*a file is in the way"):
            checkpointer.start_writing()
        with pytest.raises(UserError, match="step 1 could not be written"):
            checkpointer.save(1, make_state(), {})


def test_start_writing_leaves_its_token_alone(tmp_path):
    with Checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.start_writing()
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".writer"]


_KILLED = """
import sys, jax, jax.numpy as jnp
from moejax.train.checkpoint import Checkpointer
c = Checkpointer(sys.argv[1])
state = {"w": jax.random.normal(jax.random.key(0), (4_000_000,))}
c.save(1, state, {}); c.wait()
c.save(2, state, {})
print("saving", flush=True)
import time; time.sleep(60)
"""


@pytest.mark.slow
def test_kill_during_a_save_leaves_the_one_before(tmp_path):
    child = subprocess.Popen(
        [sys.executable, "-c", _KILLED, str(tmp_path)],
        stdout=subprocess.PIPE,
        cwd=pathlib.Path(__file__).parents[2],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert child.stdout.readline() == b"saving\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    state = jax.device_put(
        {"w": jax.random.normal(jax.random.key(0), (4_000_000,))}, jax.devices()[0]
    )
    with Checkpointer(tmp_path) as checkpointer:
        steps = checkpointer.steps()
        assert steps in ([1], [1, 2])  # the kill may come after the rename
        found = checkpointer.restore(abstract(state))
        assert found.step == steps[-1]
        assert fingerprints(found.state) == fingerprints(state)
        checkpointer.save(3, state, {})
    assert not list(tmp_path.glob("*tmp*"))
