"""What the rig compares can differ, or it would prove nothing."""

import json

import jax.numpy as jnp
import pytest

from moejax.train.checkpoint import Checkpointer
from tests.reliability import outcome


def line(kind, step, **values):
    return json.dumps({"kind": kind, "step": step, "time": 1.0, "values": values}) + "\n"


def test_records_are_compared_without_the_clock_and_once_each(tmp_path):
    metrics = tmp_path / outcome.METRICS
    metrics.write_text(line("run", 0) + line("train", 1, loss=2.0, tokens_per_second=5.0) + "{torn")
    assert outcome.figures(tmp_path) == {"train 1": {"loss": 2.0}}
    assert outcome.starts(tmp_path) == [0]
    metrics.write_text(line("train", 1, loss=2.0) + line("train", 1, loss=2.0))
    with pytest.raises(AssertionError, match="train 1 is there twice"):
        outcome.figures(tmp_path)


def test_leftovers_are_found_wherever_they_are(tmp_path):
    for name in ("step_00000002", "a.partial", "step_00000004.orbax-checkpoint-tmp", "x.deleting"):
        (tmp_path / outcome.CHECKPOINTS / name).mkdir(parents=True)
    assert len(outcome.leftovers(tmp_path)) == 3
    assert outcome.committed(tmp_path) == [2]


def test_one_bit_of_one_leaf_is_another_digest(tmp_path):
    state = {"a/b": jnp.arange(6.0), "c": jnp.int32(7)}
    for name, c in (("one", 7), ("same", 7), ("other", 6)):
        with Checkpointer(str(tmp_path / name / outcome.CHECKPOINTS)) as store:
            store.save(2, state | {"c": jnp.int32(c)}, {"position": 2})
    one, same, other = (
        outcome.read_digests(tmp_path / name, 2) for name in ("one", "same", "other")
    )
    assert one == same
    assert set(one) == {"a/b", "c", "manifest"}
    assert {name for name in one if one[name] != other[name]} == {"c", "manifest"}
