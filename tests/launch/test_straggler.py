"""Two real processes, one of which loads its data slowly: the line names it, the other waits."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.long]


def test_the_process_that_keeps_the_other_waiting_is_named(tmp_path):
    workdir = tmp_path / "run"
    words = ["train", "configs/tiny.py:smoke", f"workdir={workdir}", "mesh.data=2", "prompts=()"]
    done = subprocess.run(
        [
            *(
                "launch/local.sh",
                "2",
                "1",
                sys.executable,
                str(ROOT / "tests/launch/slow_loader.py"),
            ),
            *(*words, "steps=30", "log_every=5"),
        ],
        cwd=ROOT,
        env=os.environ
        | {"MOEJAX_CACHE": str(tmp_path), "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"slowest: process 1 (host {socket.gethostname()}): 2" in done.stderr
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    works = [r["values"]["own_work_ms"] for r in lines if "own_work_ms" in r["values"]]
    assert len(works) == 4  # of 6 records
    for first, second in works:
        assert second > 200
        assert first < 200  # the rest of its step it waits
