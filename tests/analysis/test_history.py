"""History: records to arrays, with resumes, rollbacks and gaps."""

import numpy as np

from moejax.analysis.history import build_history


def record(kind, step, time=0.0, **values):
    return {"kind": kind, "step": step, "time": time, "values": values}


def test_arrays_have_the_documented_shapes():
    router = {"router/load": [[0.5, 0.5, 0.0]] * 2, "router/entropy": [0.9, 0.8]}
    history = build_history(
        [record("run", 0, moe_layers=[1, 3])]
        + [record("train", s, loss=float(s), **router) for s in (10, 20, 30)]
        + [record("eval", 30, **{"eval/loss": 2.0})]
    )
    assert history.load.shape == (3, 2, 3)
    assert history.layers["router/entropy"].shape == (3, 2)
    assert history.scalar("loss").tolist() == [10.0, 20.0, 30.0]
    assert np.isnan(history.scalar("grad_norm")).all()
    assert history.evaluation("eval/loss").tolist() == [2.0]
    assert history.moe_layers == [1, 3]


def test_resume_replaces_what_was_gone_over_twice():
    first = [record("train", s, loss=1.0) for s in (10, 20, 30, 40)]
    first.insert(3, record("eval", 30, **{"eval/loss": 1.0}))
    second = [record("train", s, loss=2.0) for s in (30, 40, 50)]
    resumed = record("event", 20, event="resumed")
    history = build_history([record("run", 0), *first, resumed, *second])
    assert history.steps.tolist() == [10, 20, 30, 40, 50]
    assert history.scalar("loss").tolist() == [1.0, 1.0, 2.0, 2.0, 2.0]
    assert history.eval_steps.tolist() == []
    assert history.num_resumes == 1


def test_pause_before_a_resume_is_not_training_time():
    history = build_history(
        [
            record("run", 0, 100.0),
            record("train", 10, 110.0),
            record("run", 10, 5000.0),
            record("event", 10, 5001.0, event="resumed"),
            record("train", 20, 5011.0),
        ]
    )
    assert history.started == 100.0
    assert history.wall_seconds == 20.0


def test_missing_or_misshapen_values_are_nan():
    history = build_history(
        [
            record("train", 1, loss="broken", **{"router/load": [[1.0]]}),
            record("train", 2, loss=None),
            record("train", 3, loss=3.0, **{"router/load": [[0.5, 0.5]]}),
        ]
    )
    assert np.isnan(history.scalar("loss")[:2]).all()
    assert history.load.shape == (3, 1, 2)
    assert np.isnan(history.load[:2]).all()
    assert history.load[2].tolist() == [[0.5, 0.5]]


def test_no_records_at_all():
    history = build_history([])
    assert history.steps.shape == (0,)
    assert history.load.size == 0
    assert history.moe_layers == []


def test_warnings_and_end():
    history = build_history(
        [
            record("train", 5),
            record("event", 5, event="warning", text="layer 1: expert 2 ..."),
            record("event", 7, event="rollback", text="rolled back to step 4"),
            record("event", 9, event="finished", xz_bits_per_byte=1.6),
        ]
    )
    assert [(w.step, w.text) for w in history.warnings] == [
        (5, "layer 1: expert 2 ..."),
        (7, "rolled back to step 4"),
    ]
    assert history.num_rollbacks == 1
    assert history.finished["xz_bits_per_byte"] == 1.6
