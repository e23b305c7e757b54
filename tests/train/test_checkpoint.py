"""Checkpoints: exact under any layout, and never wrong in silence when storage is."""

import logging
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moejax.errors import UserError
from moejax.train import array_store
from moejax.train.checkpoint import Checkpointer
from moejax.train.fingerprint import fingerprints
from moejax.train.manifest import CorruptCheckpoint
from moejax.train.retention import Keep


class Moments(NamedTuple):
    mu: dict
    count: jax.Array


def sharding(*spec, devices=8, shape=(4, 2)):
    mesh = jax.make_mesh(
        shape, ("a", "b"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:devices]
    )
    return NamedSharding(mesh, PartitionSpec(*spec))


def make_state(seed=0, spread=True):
    """Every kind of leaf; 512 kB in the largest, so that it is not stored inside an index."""
    rng = np.random.default_rng(seed)
    w = jnp.asarray(rng.standard_normal((512, 256)), jnp.float32)
    state = {
        "params": {"w": w, "scale": jnp.asarray(rng.standard_normal(8), jnp.bfloat16)},
        "moments": Moments({"w": w * 2, "none": None}, jnp.int32(seed)),
        "key": jax.random.key(seed),
        "keys": jax.random.split(jax.random.key(seed), 4),
        "mask": jnp.arange(5) % 2 == 0,
        "bytes": jnp.arange(5, dtype=jnp.uint8),
        "half": jnp.asarray([1.0, np.inf, np.nan], jnp.float16),
        "empty": jnp.zeros((0, 3)),
    }
    if not spread:
        return jax.device_put(state, jax.devices()[0])
    state = jax.device_put(state, sharding())
    state["params"]["w"] = jax.device_put(w, sharding("a", "b"))
    state["keys"] = jax.device_put(state["keys"], sharding("a"))
    return state


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def save_steps(directory, steps, keep=None):
    with Checkpointer(directory, keep or Keep(last=None)) as checkpointer:
        for step in steps:
            checkpointer.save(step, make_state(step), {"position": step})


def restored_step(directory):
    with Checkpointer(directory) as checkpointer:
        state, extra, step = checkpointer.restore(abstract(make_state()))
        assert fingerprints(state) == fingerprints(make_state(step))
        assert extra == {"position": step}
        return step, checkpointer.problems


def data_files(directory, step):
    files = [f for f in (directory / f"step_{step:08d}").rglob("*") if f.is_file()]
    return sorted(files, key=lambda f: f.stat().st_size, reverse=True)


def flip_bit(file: pathlib.Path, where: float, bit: int = 3):
    content = bytearray(file.read_bytes())
    content[int(where * (len(content) - 1))] ^= 1 << bit
    file.write_bytes(content)


# ---- round trip ----------------------------------------------------------------------------------


def test_round_trip_is_exact_and_keeps_the_structure(tmp_path):
    state = make_state(3)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(3, state, {"position": 3, "loss": float("nan"), "names": ["a"]})
        found, extra, step = checkpointer.restore(abstract(state))
    assert step == 3
    assert extra["position"] == 3
    assert np.isnan(extra["loss"])
    assert jax.tree.structure(found) == jax.tree.structure(state)
    assert fingerprints(found) == fingerprints(state)
    assert jax.tree.map(lambda x: x.dtype, found) == jax.tree.map(lambda x: x.dtype, state)
    np.testing.assert_array_equal(
        jax.random.uniform(found["keys"][2]), jax.random.uniform(state["keys"][2])
    )


def test_restore_uses_the_target_sharding(tmp_path):
    """8 -> 1 -> 4 -> 8 devices, bit for bit."""
    state = make_state(1)
    saved = fingerprints(state)
    layouts = [
        sharding(devices=1, shape=(1, 1)),
        sharding("b", "a", devices=4, shape=(2, 2)),
        sharding(None, ("a", "b")),
    ]
    with Checkpointer(tmp_path, Keep(last=None)) as checkpointer:
        for step, layout in enumerate(layouts):
            checkpointer.save(step, state, {})
            target = abstract(jax.device_put(state, sharding(devices=1, shape=(1, 1))))
            w = target["params"]["w"]
            target["params"]["w"] = jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=layout)
            state = checkpointer.restore(target).state
            assert state["params"]["w"].sharding == layout
            assert state["key"].sharding == target["key"].sharding
            assert fingerprints(state) == saved


def test_saved_values_survive_donation_of_the_buffers(tmp_path):
    state = {"w": jnp.arange(1 << 20, dtype=jnp.float32)}
    before = fingerprints(state)
    bump = jax.jit(lambda s: jax.tree.map(lambda x: x * 1.5 + 1, s), donate_argnums=0)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, state, {})
        for _ in range(5):
            state = bump(state)
        jax.block_until_ready(state)
        found = checkpointer.restore(abstract(state))
    assert fingerprints(found.state) == before


def test_restore_of_some_leaves_reads_only_those(tmp_path):
    state = make_state(2)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(2, state, {})
        wanted = {"params/w": abstract(state)["params"]["w"]}
        found = checkpointer.restore_leaves(wanted)
        assert list(found.state) == ["params/w"]
        np.testing.assert_array_equal(found.state["params/w"], state["params"]["w"])
        with pytest.raises(UserError, match="params/v is not there"):
            checkpointer.restore_leaves({"params/v": wanted["params/w"]})


def test_float64_state(tmp_path):
    with jax.enable_x64(True):
        state = {"w": jnp.asarray([1 / 3, -0.0], jnp.float64), "n": jnp.int64(2**40)}
        with Checkpointer(tmp_path) as checkpointer:
            checkpointer.save(0, state, {})
            found = checkpointer.restore(abstract(state)).state
        assert found["w"].dtype == jnp.float64
        assert fingerprints(found) == fingerprints(state)


def test_abstract_leaf_without_sharding_is_an_error(tmp_path):
    save_steps(tmp_path, [1])
    bare = jax.eval_shape(make_state)
    with (
        Checkpointer(tmp_path) as checkpointer,
        pytest.raises(ValueError, match="needs a sharding"),
    ):
        checkpointer.restore(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), bare))


def test_extra_that_is_not_json_is_an_error_before_anything_is_written(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(TypeError, match="plain JSON"):
            checkpointer.save(1, make_state(), {"x": object()})
        assert checkpointer.steps() == []


# ---- damage --------------------------------------------------------------------------------------


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


def test_empty_directory(tmp_path):
    with Checkpointer(tmp_path / "new") as checkpointer:
        assert checkpointer.steps() == []
        with pytest.raises(UserError, match="there is no checkpoint in"):
            checkpointer.restore(abstract(make_state()))
    assert not (tmp_path / "new").exists()


# ---- another experiment --------------------------------------------------------------------------


def _wider(target):
    w = target["params"]["w"]
    target["params"]["w"] = jax.ShapeDtypeStruct((512, 128), w.dtype, sharding=w.sharding)


def _other_dtype(target):
    w = target["params"]["w"]
    target["params"]["w"] = jax.ShapeDtypeStruct(w.shape, jnp.bfloat16, sharding=w.sharding)


def _more(target):
    target["params"]["bias"] = target["params"]["w"]


def _fewer(target):
    del target["params"]["scale"]


@pytest.mark.parametrize(
    "change, text",
    [
        (_wider, r"params/w is float32\[512, 256\] there and float32\[512, 128\] in this"),
        (_other_dtype, r"params/w is float32\[512, 256\] there and bfloat16\[512, 256\]"),
        (_more, "params/bias is not there"),
        (_fewer, "it has params/scale, which this configuration does not have"),
    ],
)
def test_another_experiments_state_is_an_error_and_not_corruption(tmp_path, change, text):
    save_steps(tmp_path, [10, 20])
    target = abstract(make_state())
    change(target)
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(UserError, match=f"step_00000020 belongs to another experiment: {text}"):
            checkpointer.restore(target)
        assert checkpointer.problems == []


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
            checkpointer.check_writable()
        with pytest.raises(UserError, match="step 1 could not be written"):
            checkpointer.save(1, make_state(), {})


def test_check_writable_leaves_nothing_behind(tmp_path):
    with Checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.check_writable()
    assert list((tmp_path / "run").iterdir()) == []


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


# ---- keeping -------------------------------------------------------------------------------------


def test_keep_last(tmp_path):
    save_steps(tmp_path, [1, 2, 3, 4, 5], Keep(last=2))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000004", "step_00000005"]


def test_keep_every_and_best():
    steps = [10, 20, 30, 40, 50]
    metrics = {10: {"loss": 3.0}, 20: {"loss": 1.0}, 30: {"loss": float("nan")}, 40: {"loss": 2.0}}
    assert Keep(last=1).wanted(steps, metrics) == {50}
    assert Keep(last=1, every=20).wanted(steps, metrics) == {20, 40, 50}
    assert Keep(last=1, best=2).wanted(steps, metrics) == {20, 40, 50}
    assert Keep(last=None).wanted(steps, {}) == set(steps)
    for wrong in ({"last": 0}, {"every": 0}, {"best": -1}):
        with pytest.raises(UserError):
            Keep(**wrong)


def test_keep_best_reads_the_metrics_saved(tmp_path):
    with Checkpointer(tmp_path, Keep(last=1, best=1, metric="bpb")) as checkpointer:
        for step, value in enumerate([2.0, 1.5, 1.9, float("nan")]):
            checkpointer.save(step, {"w": jnp.float32(step)}, {"metrics": {"bpb": value}})
    assert Checkpointer(tmp_path).steps() == [1, 3]


def test_resuming_from_an_earlier_step_leaves_the_later_timeline_without_losing_it(tmp_path):
    save_steps(tmp_path, [10, 20, 30])
    with Checkpointer(tmp_path, Keep(last=None)) as checkpointer:
        checkpointer.restore(abstract(make_state()), step=10)
        checkpointer.save(25, make_state(25), {"position": 25})
        checkpointer.wait()
        assert checkpointer.steps() == [10, 25]
    assert (tmp_path / "step_00000020.superseded").is_dir()
    assert (tmp_path / "step_00000030.superseded").is_dir()
    assert restored_step(tmp_path)[0] == 25


def test_saving_the_same_step_twice_does_nothing(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(10, make_state(10), {"position": 10})
        checkpointer.save(10, make_state(10), {"position": 10})
        checkpointer.save(10, make_state(11), {"position": 10})  # but not with another state
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["step_00000010", "step_00000010.superseded"]
