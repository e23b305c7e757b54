"""Which ends of a job launch/slurm.sh answers with a restart; srun and scontrol are the test's."""

import os
import pathlib
import subprocess

import pytest

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / "launch" / "slurm.sh"
STOPPED, EXPIRED = 85, 75

SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
SLURM_PROCID=0 "$@"
"""
SCONTROL = """#!/bin/bash
echo "$@" >>"$(dirname "$0")/requeued"
"""


@pytest.fixture
def job(tmp_path):
    """Runs the script once with a command of that status: (status, whether it was put back)."""
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    requeued = tmp_path / "requeued"

    def run(status, *, restarts):
        requeued.write_text("")
        settings = {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "7",
            "SLURM_RESTART_COUNT": str(restarts),
            "MOEJAX_MAX_RESTARTS": "2",
        }
        words = [SCRIPT, "cpus:1", "bash", "-c", f"exit {status}"]
        done = subprocess.run(words, cwd=tmp_path, env=settings, check=False, timeout=60)
        return done.returncode, requeued.read_text() == "requeue 7\n"

    return run


@pytest.mark.parametrize("status", [EXPIRED, 137])
def test_a_failure_after_many_orderly_stops_is_the_first(job, status):
    for restarts in range(28, 31):
        assert job(STOPPED, restarts=restarts) == (0, True)
    assert job(status, restarts=30) == (0, True)


def test_failures_are_counted_whatever_lies_between_them(job, tmp_path):
    assert job(EXPIRED, restarts=0) == (0, True)
    assert job(STOPPED, restarts=1) == (0, True)
    assert job(137, restarts=2) == (0, True)
    assert job(EXPIRED, restarts=3) == (EXPIRED, False)
    assert not list(tmp_path.glob(".moejax-*"))


@pytest.mark.parametrize("status", [0, 1, 2])
def test_an_end_of_its_own_is_the_jobs(job, status):
    assert job(status, restarts=0) == (status, False)
