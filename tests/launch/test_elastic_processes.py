"""A run of one process goes on in two, which read the same stream and restore the same state."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
MOEJAX = (sys.executable, "-m", "moejax")

pytestmark = pytest.mark.long


def run(*words, cache, across=None):
    launcher = ("launch/local.sh", str(across), str(4 // across)) if across else ()
    done = subprocess.run(
        [*launcher, *map(str, words)],
        cwd=ROOT,
        env=os.environ
        | {
            "MOEJAX_CACHE": str(cache),
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "4",
            "TMPDIR": str(cache),
        },
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def records(workdir, kind):
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def test_one_process_then_two_are_as_one(tmp_path):
    """Six steps of one process, against three of one and three of two on another mesh."""
    train = (*MOEJAX, "train", "configs/tiny.py:smoke", "batch_size=8", "prompts=()", "steps=6")
    train += ("model.num_layers=1", "mesh.fsdp=2", "mesh.data=2")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(*train, f"workdir={whole}", cache=tmp_path)
    run(*train, f"workdir={parts}", "--until", 3, cache=tmp_path)
    saved = json.loads((parts / "checkpoints/step_00000003/manifest/manifest.json").read_text())
    run(*MOEJAX, "train", parts, "mesh.data=1", "mesh.expert=2", cache=tmp_path, across=2)
    assert [record["step"] for record in records(parts, "run")] == [0, 3]
    found, expected = (
        {record["step"]: record["values"]["loss"] for record in records(folder, "train")}
        for folder in (parts, whole)
    )
    assert sorted(found) == list(range(1, 7))
    for step, loss in expected.items():
        assert found[step] == pytest.approx(loss, abs=1e-5), step
    # Restoring compared every leaf's fingerprint with the one in this manifest.
    assert saved["content"]["extra"]["data_position"] == 3
