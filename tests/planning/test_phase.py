"""A plan of a model that changes with the step is of one phase, and says of which."""

import dataclasses

import pytest

from moejax.attention.full import FullAttention
from moejax.attention.moba import MoBA
from moejax.planning import text
from moejax.planning.phase import longest
from tests.planning import planned

MOBA = "configs/long_context_moba.py:smoke"


def phase(*overrides):
    experiment = planned.experiment(MOBA, *overrides)
    return longest(experiment.build_model(100), experiment.steps)


def test_the_longest_phase():
    blocks = phase("steps=10", "model.block.attention.until_step=8")
    assert isinstance(blocks.model.block.attention, MoBA)
    assert (blocks.first, blocks.count) == (0, 8)
    assert str(blocks) == "the 8 of 10 steps that compute like step 0"
    full = phase("steps=10", "model.block.attention.until_step=3")
    assert isinstance(full.model.block.attention, FullAttention)
    assert (full.first, full.count) == (3, 7)


def test_steps_that_compute_alike_are_one_phase():
    words = ("model.block.attention.from_step=3", "model.block.attention.until_step=7")
    full = phase("steps=10", *words)
    assert isinstance(full.model.block.attention, FullAttention)
    assert (full.first, full.count) == (0, 6)


@pytest.mark.parametrize("until", ["null", "10", "99"])
def test_none_where_all_steps_are_alike(until):
    assert phase("steps=10", f"model.block.attention.until_step={until}") is None


def test_none_without_a_switch():
    experiment = planned.experiment(planned.SMOKE[0])
    assert longest(experiment.build_model(100), experiment.steps) is None


@pytest.mark.slow
def test_the_plan_is_of_that_phase_and_memory_of_the_run():
    words = ("mesh.fsdp=4", "mesh.data=2", "batch_size=8")
    until = "model.block.attention.until_step"
    mixed = planned.plan(MOBA, (*words, "steps=10", f"{until}=8"))
    blocks = planned.plan(MOBA, (*words, "steps=10", f"{until}=null"))
    assert mixed.work == blocks.work
    assert mixed.flops == blocks.flops
    assert mixed.memory != blocks.memory  # the run's program holds both phases
    said = text.describe(mixed)
    assert "are of the 8 of 10 steps that compute like step 0,\nmemory is of the whole run" in said
    assert text.as_json(mixed)["phase"] == str(mixed.phase)
    assert "steps that compute" not in text.describe(dataclasses.replace(mixed, phase=None))


@pytest.mark.slow
def test_branches_that_products_alone_have_chosen_are_said():
    found = planned.plan()
    tied = dataclasses.replace(found, work=dataclasses.replace(found.work, tied=3))
    assert "of 3 conditionals that no collective decides, the branch with" in text.describe(tied)
    assert text.as_json(tied)["tied_conditionals"] == 3
    assert found.work.tied == 0
