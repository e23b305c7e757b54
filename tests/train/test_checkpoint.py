"""Checkpoints: exact under any layout, never another experiment's, kept and left as told."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from saved_state import abstract, make_state, restored_step, save_steps, sharding

from moejax.errors import UserError
from moejax.train.checkpoint import Checkpointer
from moejax.train.fingerprint import fingerprints
from moejax.train.retention import Keep

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


# ---- keeping -------------------------------------------------------------------------------------


def test_keep_last(tmp_path):
    save_steps(tmp_path, [1, 2, 3, 4, 5], Keep(last=2))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000004", "step_00000005"]


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


def test_what_was_set_aside_goes_once_the_new_timeline_can_stand_alone(tmp_path):
    def names():
        return sorted(p.name.removeprefix("step_000000") for p in tmp_path.iterdir())

    def save(step):
        checkpointer.save(step, make_state(step), {"position": step})
        checkpointer.wait()

    save_steps(tmp_path, [10, 20, 30])
    with Checkpointer(tmp_path, Keep(last=2)) as checkpointer:
        checkpointer.restore(abstract(make_state()), step=10)
        save(25)
        assert names() == ["10", "20.superseded", "25", "30.superseded"]
        save(26)
        assert names() == ["25", "26", "30.superseded"]
        (tmp_path / "step_00000026/manifest/manifest.json").write_text("{")
        save(30)
        save(35)  # two at or after 30, so that nothing hangs on what was set aside
        assert names() == ["30", "35"]


def test_a_corrupt_checkpoint_does_not_make_what_was_set_aside_superfluous(tmp_path):
    save_steps(tmp_path, [10, 20])
    with Checkpointer(tmp_path, Keep(last=2)) as checkpointer:
        checkpointer.restore(abstract(make_state()), step=10)
        checkpointer.save(20, make_state(20), {"position": 20})
        checkpointer.wait()
        (tmp_path / "step_00000020/manifest/manifest.json").write_text("{")
        checkpointer.save(21, make_state(21), {"position": 21})
        checkpointer.wait()
        assert (tmp_path / "step_00000020.superseded").is_dir()
        checkpointer.save(22, make_state(22), {"position": 22})
    assert not list(tmp_path.glob("*.superseded"))


def test_saving_the_same_step_twice_does_nothing(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(10, make_state(10), {"position": 10})
        checkpointer.save(10, make_state(10), {"position": 10})
        checkpointer.save(10, make_state(11), {"position": 10})  # but not with another state
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["step_00000010", "step_00000010.superseded"]
