"""Refused steps change nothing, and too many of them roll the parameters back."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.errors import UserError
from moejax.objectives.lm import NextToken
from moejax.train.checkpoint import Checkpointer
from moejax.train.loop import train
from tests.train.smoke_runs import records

UNUSED = 263  # the smallest vocabulary's last ids are of no text


@dataclasses.dataclass(frozen=True, kw_only=True)
class NotFiniteAt(NextToken):
    """Next-token prediction whose loss is NaN from step `first` up to step `last`."""

    first: int
    last: int

    def __call__(self, model, variables, batch, *, step=0, **kwargs):
        result = super().__call__(model, variables, batch, step=step, **kwargs)
        bad = (step >= self.first) & (step <= self.last) & jnp.asarray("key" in kwargs)
        total, count = result.terms["lm"]
        terms = result.terms | {"lm": (total + jnp.where(bad, jnp.nan, 0.0), count)}
        return dataclasses.replace(result, terms=terms)


@pytest.mark.slow
def test_a_refused_step_changes_nothing_but_the_position(smoke):
    experiment = smoke("nan", "steps=3", "log_every=1")
    experiment = dataclasses.replace(experiment, objective=NotFiniteAt(first=1, last=1))
    train(experiment, name="nan")
    values = [r["values"] for r in records(experiment) if r["kind"] == "train"]
    assert [v["skipped"] for v in values] == [0, 1, 1]
    assert values[1]["loss"] == "nan"
    assert isinstance(values[2]["loss"], float)


@pytest.mark.slow
def test_too_many_refusals_roll_back_and_data_go_on(smoke):
    experiment = smoke(
        "rollback",
        *("steps=9", "log_every=1", "checkpoint_every=2", "guard.max_consecutive_skips=1"),
        "keep_last=5",
    )
    experiment = dataclasses.replace(experiment, objective=NotFiniteAt(first=4, last=5))
    assert train(experiment, name="rollback").step == 9
    events = [r["values"] for r in records(experiment) if r["kind"] == "event"]
    texts = [e["text"] for e in events if e.get("event") == "rollback"]
    assert texts == ["rolled back to the parameters of step 4; data go on at 6"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoisonAt(NextToken):
    """Next-token prediction whose step `at` ruins the parameters: their loss is NaN from then on.

    It moves the embedding of a token that is not in use, and is an ordinary step otherwise.
    """

    at: int

    def __call__(self, model, variables, batch, *, step=0, **kwargs):
        result = super().__call__(model, variables, batch, step=step, **kwargs)
        row = variables["params"]["embed"]["embedding"][UNUSED]
        fresh = model.init(jax.random.split(jax.random.key(0))[0])["params"]["embed"]["embedding"]
        ruined = jnp.abs(jax.lax.stop_gradient(row) - fresh[UNUSED]).max() > 1e-3
        bad = ruined & jnp.asarray("key" in kwargs)
        total, count = result.terms["lm"]
        total = total + jnp.where(step == self.at, row.sum(), 0) + jnp.where(bad, jnp.nan, 0)
        return dataclasses.replace(result, terms=result.terms | {"lm": (total, count)})


@pytest.mark.slow
def test_a_step_on_its_way_at_a_roll_back_does_not_ask_for_another(smoke):
    """Of what was refused last, the figures come when the next step is already computed."""
    experiment = smoke(
        "in-flight",
        *("steps=14", "log_every=1", "checkpoint_every=4", "guard.max_consecutive_skips=1"),
        "keep_last=5",
    )
    experiment = dataclasses.replace(experiment, objective=PoisonAt(at=4))
    assert train(experiment, name="in-flight").step == 14
    found = records(experiment)
    (text,) = [r["values"]["text"] for r in found if r["values"].get("event") == "rollback"]
    assert text == "rolled back to the parameters of step 4; data go on at 8"
    values = [r["values"] for r in found if r["kind"] == "train"]
    assert [v["skipped"] for v in values] == [0] * 5 + [1, 2, 3] + [3] * 6
    schedule = experiment.optimizer.schedule.build(experiment.steps)
    # Updates 0 to 3 are in the checkpoint; that of step 4 was lost, and is made from batch 8.
    updates = [0, 1, 2, 3, 4, 4, 4, 4, *range(4, 10)]
    np.testing.assert_allclose([v["learning_rate"] for v in values], schedule(np.array(updates)))


def _refused_at_5_and_6(smoke, name):
    overrides = ("steps=9", "checkpoint_every=2", "guard.max_consecutive_skips=1", "keep_last=5")
    experiment = smoke(name, *overrides)
    return dataclasses.replace(experiment, objective=NotFiniteAt(first=4, last=5))


def _damage_before_restoring(monkeypatch, *steps):
    restore = Checkpointer.restore

    def damaged(self, *args, **kwargs):
        for step in steps:
            (self.directory.path(step) / "manifest" / "manifest.json").write_text("{")
        return restore(self, *args, **kwargs)

    monkeypatch.setattr(Checkpointer, "restore", damaged)


@pytest.mark.slow
def test_a_roll_back_passes_over_a_corrupt_checkpoint_and_names_it(smoke, monkeypatch):
    experiment = _refused_at_5_and_6(smoke, "damaged")
    _damage_before_restoring(monkeypatch, 4)
    assert train(experiment, name="damaged").step == 9
    (text,) = [
        r["values"]["text"] for r in records(experiment) if r["values"].get("event") == "rollback"
    ]
    assert text == (
        "rolled back to the parameters of step 2; data go on at 6; "
        "corrupt and not used: step 4: its manifest is not readable"
    )


@pytest.mark.slow
def test_a_roll_back_without_a_sound_checkpoint_is_an_error(smoke, monkeypatch):
    experiment = _refused_at_5_and_6(smoke, "all-damaged")
    _damage_before_restoring(monkeypatch, 2, 4)
    with pytest.raises(UserError, match="steps up to step 6 were refused.*step 4: .*step 2: "):
        train(experiment, name="all-damaged")


@pytest.mark.slow
def test_refusals_without_end_are_an_error_that_names_the_way_out(smoke):
    experiment = smoke("hopeless", "steps=9", "guard.max_consecutive_skips=1")
    experiment = dataclasses.replace(experiment, objective=NotFiniteAt(first=0, last=99))
    with pytest.raises(UserError, match=r"2 steps up to step 2 were refused.*schedule.peak"):
        train(experiment, name="hopeless")
