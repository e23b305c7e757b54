"""`import-hf --check`: what it compares, what it says, and that a wrong map fails it."""

import dataclasses
import importlib
import sys

import numpy as np
import pytest

from moejax.commands import main
from moejax.errors import UserError
from moejax.interop import hf, logit_check
from moejax.interop.logit_check import TOLERANCE, compare, our_logits, rows
from moejax.layers.rope import LongRopeScaling, Rope
from tests.interop.tiny_checkpoints import MODELS, variables, written
from tests.models.tiny_model import attention, dense

RNG = np.random.default_rng(0)
LOGITS = RNG.standard_normal((50, 24)).astype(np.float32)


def swapped(tensors: dict, one: str, other: str) -> dict:
    return tensors | {one: tensors[other], other: tensors[one]}


# What a map or a reading of config.json could have wrong, as edits of an architecture.
PLANTED = {
    "gate and up": lambda a: {
        "tensors": swapped(a.tensors, "ffn/experts/gate", "ffn/experts/up"),
    },
    "query and key": lambda a: {
        "tensors": swapped(a.tensors, "attention/query/kernel", "attention/key/kernel"),
    },
    "norms of queries and keys": lambda a: {
        "tensors": swapped(a.tensors, "attention/query_norm/scale", "attention/key_norm/scale"),
    },
    "a field that is not read": lambda a: {
        "fields": tuple(f for f in a.fields if getattr(f, "key", "") != "norm_topk_prob"),
    },
}


def plant(monkeypatch, wrong: str) -> None:
    module = importlib.import_module("moejax.interop.architectures.olmoe")
    changed = dataclasses.replace(module.ARCHITECTURE, **PLANTED[wrong](module.ARCHITECTURE))
    monkeypatch.setattr(module, "ARCHITECTURE", changed)


def test_rounding_agrees_and_more_does_not():
    noise = RNG.uniform(-1, 1, LOGITS.shape).astype(np.float32)
    near = compare(LOGITS + 0.5 * TOLERANCE * noise, LOGITS)
    assert near.agrees
    assert near.same_argmax > 0.9
    assert "verdict: the logits agree" in str(near)
    far = compare(LOGITS + 50 * TOLERANCE * noise, LOGITS)
    assert not far.agrees
    assert far.num_apart == 50
    assert "DISAGREE, 50 of 50 positions" in str(far)
    assert "rounding" not in str(far)


def test_one_position_apart_is_enough_and_is_explained():
    one = LOGITS.copy()
    one[7, 3] += 0.1
    found = compare(one, LOGITS)
    assert (found.num_apart, found.agrees) == (1, False)
    assert found.max_difference == pytest.approx(0.1, rel=1e-5)
    assert "two experts of nearly the same score" in str(found)


def test_no_number_and_no_spread_are_no_agreement():
    broken = LOGITS.copy()
    broken[3] = np.nan
    assert compare(broken, LOGITS).num_apart == 1
    assert not compare(LOGITS, broken).agrees
    assert not compare(np.zeros_like(LOGITS), np.zeros_like(LOGITS)).agrees


def test_rows_are_the_same_every_time_and_some_are_padded():
    model = dense(vocab_size=24)
    tokens, mask = rows(model)
    np.testing.assert_array_equal(tokens, rows(model)[0])
    assert tokens.shape == mask.shape == (4, 160)
    assert mask.sum(1).tolist() == [160, 160, 90, 7]
    assert tokens.min() >= 0
    assert tokens.max() < 24
    assert rows(dense(max_length=64))[1].sum(1).tolist() == [64, 64, 64, 7]


def test_rows_stay_within_the_short_factors_of_longrope():
    factors = {"short_factors": (1.0, 1.0), "long_factors": (2.0, 4.0)}
    scaling = LongRopeScaling(
        **factors, short_amplitude=1.0, long_amplitude=1.2, original_context=16
    )
    model = dense(attention=attention(rope=Rope(scaling=scaling)), max_length=64)
    assert rows(model)[1].sum(1).tolist() == [16, 16, 16, 7]


@pytest.fixture
def beside_our_own(monkeypatch, tmp_path):
    """A folder; in the place of transformers stands moejax with the weights as they were drawn."""
    source = written("olmoe", tmp_path / "hf", dtype="bfloat16")
    model, stored = hf.load(source)
    assert model == dataclasses.replace(MODELS["olmoe"], dtype="bfloat16", param_dtype="bfloat16")
    exact = lambda tokens, mask: our_logits(MODELS["olmoe"], variables("olmoe"), tokens, mask)
    monkeypatch.setattr(logit_check, "require_transformers", lambda: None)
    monkeypatch.setattr(logit_check, "their_logits", lambda _, tokens, mask: exact(tokens, mask))
    return source


@pytest.mark.slow
def test_an_import_that_agrees_is_made(beside_our_own, tmp_path, capsys):
    """The golden weights are exact in bfloat16; both sides compute in float32."""
    assert main(["import-hf", str(beside_our_own), str(tmp_path / "out"), "--check"]) == 0
    out = capsys.readouterr().out
    assert "positions compared    417" in out
    assert "verdict: the logits agree" in out
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["gate and up", "a field that is not read"])
def test_a_wrong_map_fails_and_leaves_nothing(beside_our_own, tmp_path, capsys, monkeypatch, wrong):
    plant(monkeypatch, wrong)
    assert main(["import-hf", str(beside_our_own), str(tmp_path / "out"), "--check"]) == 1
    out = capsys.readouterr().out
    assert "DISAGREE" in out
    assert f"{tmp_path / 'out'} was not made" in out
    assert "moejax train" not in out
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_without_transformers_nothing_is_done(tmp_path, capsys, monkeypatch, package):
    for name in {"torch", "transformers"} - {package}:
        monkeypatch.setitem(sys.modules, name, sys)
    monkeypatch.setitem(sys.modules, package, None)
    source = written("olmoe", tmp_path / "hf")
    assert main(["import-hf", str(source), str(tmp_path / "out"), "--check"]) == 2
    text = capsys.readouterr().err
    assert f"comparing with transformers needs {package}" in text
    assert "pip install" in text
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    with pytest.raises(UserError, match=package):
        logit_check.require_transformers()
