"""The plan command: its report, its exit status, and every mistake in one sentence."""

import importlib.util
import json
import pathlib

import jax
import pytest

from moejax.commands import main, plan
from moejax.planning import text
from tests.planning import planned

ROOT = pathlib.Path(__file__).resolve().parents[2]
SMOKE = str(ROOT / "configs" / "olmoe_1b_7b.py:smoke")


@pytest.fixture(autouse=True)
def started(monkeypatch):
    """JAX runs already, so what the command would set before it starts changes nothing."""
    monkeypatch.setattr(plan, "_prepare_jax", lambda topology: None)


def error_of(capsys, *words):
    assert main(["plan", SMOKE, *words]) == 2
    found = capsys.readouterr().err
    assert found.startswith("error: ")
    assert found.count("\n") == 1
    return found


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--topology", "v5p:3x3x3"], "there is no topology 'v5p:3x3x3'; v5p has 2x2x1, 2x2x2"),
        (["--topology", "v12:8"], "write v5p:8x8x8"),
        (["--topology", "h100:8x8", "--slices", "2"], "h100 has no slices"),
        (["mesh.data=null", "mesh.fsdp=3", "--topology", "cpu:8"], "do not divide the 8 devices"),
        (["mesh.expert=16", "--topology", "cpu:8"], "the mesh needs 16 devices and there are 8"),
        (["mesh.data=8", "--topology", "cpu:8"], "= 4 cannot be split 8 ways"),
        (
            ["mesh.data=1", "mesh.fsdp=4", "--topology", "cpu:8"],
            "the mesh uses 4 of 8 devices, which a run of several processes refuses: leave "
            "mesh.data unset, set it to 2, or plan for 4 devices",
        ),
        (["mesh.fsdp=64", "mesh.data=1", "--topology", "cpu:8"], "the mesh needs 64 devices"),
        (["--topology", "cpu:1", "--update-contract"], "--update-contract needs --contract FILE"),
        (["--topology", "cpu:1", "--contract", "/no/such"], "write it with --update-contract"),
        ([], "the following arguments are required: --topology"),
    ],
)
def test_mistakes(capsys, words, says):
    assert says in error_of(capsys, *words)


@pytest.mark.parametrize(
    ("topology", "extra"), [("v5p:2x2x1", "moejax[tpu]"), ("h100:1x8", "moejax[cuda]")]
)
def test_a_missing_compiler(capsys, monkeypatch, topology, extra):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert f"pip install '{extra}'" in error_of(capsys, "--topology", topology)


def test_an_unknown_vocabulary(capsys):
    words = ["data.tokenizer=moejax.data.subword:HFTokenizer", "data.tokenizer.path=/no/such"]
    assert "give --vocab-size N" in error_of(capsys, *words, "--topology", "cpu:1")


@pytest.mark.slow
def test_reports_writes_and_compares(capsys, tmp_path):
    """One compiled step, and another that breaks its contract."""
    contract, figures = tmp_path / "contract.txt", tmp_path / "plan.json"
    words = ["plan", SMOKE, "mesh.data=null", "mesh.fsdp=4", "mesh.expert=2", "batch_size=8"]
    words += ["--topology", "cpu:8", "--contract", str(contract)]
    assert main([*words, "--update-contract", "--json", str(figures)]) == 0
    said = capsys.readouterr().out
    assert "cpu:8: 8 devices (simulated on this CPU), mesh fsdp=4, expert=2" in said
    assert "estimate of a step" not in said  # no roofline of simulated devices
    found = json.loads(figures.read_text())
    assert found["config"] == SMOKE
    assert found["memory"]["fits"] is True
    assert {c["kind"] for c in found["collectives"]} >= {"all-gather", "all-reduce", "all-to-all"}
    assert contract.read_text().startswith(f"# moejax plan {SMOKE} mesh.data=null mesh.fsdp=4 ")

    contract.write_text(
        contract.read_text().replace(
            "all-to-all over expert (2): ", "all-to-all over expert (2): 1"
        )
    )
    assert main(words) == 1
    said = capsys.readouterr().out
    assert "BREAKS ITS CONTRACT\n" in said
    assert "\n  +all-to-all over expert (2): " in said


@pytest.mark.slow
def test_what_does_not_fit_is_said_and_advised(monkeypatch):
    import dataclasses

    found = planned.plan()
    memory = dataclasses.replace(found.memory, capacity=found.memory.needed - 1)
    refused = dataclasses.replace(
        found, memory=memory, advice=["num_microbatches=2 (it is 1)"], refusal="HBM is full\nmore"
    )
    said = text.describe(refused)
    assert "DOES NOT FIT" in said
    assert "the compiler says: HBM is full\n" in said
    assert "what to change\n  num_microbatches=2" in said


def test_prepares_simulated_devices(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "8")
    monkeypatch.setenv("JAX_PLATFORMS", "")
    plan._prepare_jax("cpu:16")
    import os

    assert os.environ["JAX_NUM_CPU_DEVICES"] == "16"
    assert os.environ["JAX_PLATFORMS"] == "cpu"
    assert jax.device_count() == 8  # too late here
