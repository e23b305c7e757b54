"""Every implementation of block attention agrees with its definition, in value and gradients."""

import jax
import jax.numpy as jnp
import pytest

from moejax.kernels import block_attention
from moejax.kernels.block_attention import (
    IMPLEMENTATIONS,
    blocks,
    combine,
    implementations,
    operands,
    packed_passes,
)
from moejax.kernels.block_attention import conformance as kit

BY_NAME = {case.name: case for case in kit.CASES}
PORTABLE = ("scan", "packed")
FEW = ("ragged tail, narrow values", "chosen by the group", "segments", "queries of segments")
OFTEN = {("packed", name) for name in (*FEW, "own block alone", "everyone chooses one block")}
OFTEN.add(("scan", "segments"))
RUNS = [
    pytest.param(name, case, marks=() if (name, case.name) in OFTEN else pytest.mark.slow)
    for name in PORTABLE
    for case in kit.CASES
]


def test_every_implementation_is_tested_somewhere():
    elsewhere = {"tpu"}  # test_tpu_block_attention.py
    assert set(IMPLEMENTATIONS) == {*PORTABLE, *elsewhere}


@pytest.mark.parametrize("name, case", RUNS, ids=lambda x: getattr(x, "name", x))
def test_agrees_with_the_definition(name, case):
    assert not kit.failures(name, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", FEW)
@pytest.mark.parametrize("name", PORTABLE)
def test_bfloat16(name, case):
    assert not kit.failures(name, BY_NAME[case], dtype="bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize("case", FEW)
@pytest.mark.parametrize("name", PORTABLE)
def test_float64(name, case):
    kit._wanted.cache_clear()  # arrays of another precision
    with jax.enable_x64(True):
        assert not kit.failures(name, BY_NAME[case], dtype="float64")


@pytest.mark.slow
@pytest.mark.parametrize("choice", [("scan", "packed"), ("packed", "scan")])
def test_each_product_may_have_an_implementation_of_its_own(monkeypatch, choice):
    chosen = implementations.Choice(*choice)
    monkeypatch.setattr(block_attention, "choose", lambda *_, **__: chosen)
    assert not kit.failures(None, BY_NAME["segments"])


# What the kit is for: these mistakes are found, and by the cases that are meant to find them.


def _no_window(*_):
    return 0


def _another_block(*args, select=operands.select, **options):
    """The one before the best."""
    targets, blocks = select(*args, **options), args[2]
    lower = targets - 1 >= blocks.first_target[:, None, None, :, None]
    return jnp.where((targets < blocks.num_targets) & lower, targets - 1, targets)


def _own_part_alone(own, own_lse, rows, rows_lse, slots):
    """A log-sum-exp that forgets the other blocks."""
    out, _ = combine.combine(own, own_lse, rows, rows_lse, slots)
    return out, own_lse


@pytest.mark.parametrize(
    "place, name, mistake, found_by, not_by",
    [
        (blocks, "_reach", _no_window, "segments", "whole blocks"),
        (operands, "select", _another_block, "whole blocks", "every block"),
        (packed_passes, "combine", _own_part_alone, "grouped queries", "own block alone"),
    ],
)
def test_a_mistake_is_noticed(monkeypatch, place, name, mistake, found_by, not_by):
    monkeypatch.setattr(place, name, mistake)
    assert kit.failures("packed", BY_NAME[found_by])
    assert not kit.failures("packed", BY_NAME[not_by])
