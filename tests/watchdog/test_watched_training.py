"""`moejax train` under its watchdog: a real run, stuck in each of its phases."""

import os
import subprocess
import sys

import pytest

from moejax.watchdog.parent import EXPIRED
from tests.watchdog.watched import ROOT, environment

PHASES = ("start", "prepare", "restore", "compile", "data", "step", "save", "exit")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


def train(*words, launcher=(), deadlines, **settings):
    planted = [sys.executable, str(ROOT / "tests/watchdog/planted.py"), *words]
    return subprocess.run(
        [*launcher, *planted],
        cwd=ROOT,
        env=environment(deadlines, **settings),
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def words_of(phase, workdir):
    return [phase, "train", "configs/tiny.py:smoke", f"workdir={workdir}", "prompts=()"]


@pytest.mark.parametrize(
    "phase", [p if p == "data" else pytest.param(p, marks=pytest.mark.long) for p in PHASES]
)
def test_a_hang_in_each_phase_of_a_run_is_ended_and_named(phase, tmp_path, cache):
    words = [*words_of(phase, tmp_path / "run"), "checkpoint_every=1"]
    seconds = 25  # more than any phase takes that does not hang, compilation and imports included
    done = train(*words, deadlines=f"{phase}={seconds}", MOEJAX_CACHE=cache)
    assert done.returncode == EXPIRED, done.stderr
    assert f"process 0 has been in phase '{phase}'" in done.stderr
    if phase != "start":  # there it hangs before anything could print stacks
        assert "in stuck_in_c" in done.stderr
    if phase in ("restore", "compile", "data", "step", "save"):
        assert "(it is the only one)" in done.stderr


@pytest.mark.long
def test_of_two_processes_the_one_that_hangs_in_loading_data_is_named(tmp_path, cache):
    """Process 0, whose deadline comes first, waits in a step for process 1."""
    words = [*words_of("data", tmp_path / "run"), "mesh.data=2", "steps=8"]
    done = train(
        *words,
        launcher=("launch/local.sh", "2", "1"),
        deadlines="step=30,first_step=30",
        MOEJAX_CACHE=cache,
        PLANT_PROCESS="1",
        TMPDIR=str(tmp_path),
    )
    assert done.returncode == EXPIRED, done.stderr
    assert "process 0 has been in phase " in done.stderr
    assert f"process 1 (on {os.uname().nodename}), in phase 'data' of step 2, is behind" in (
        done.stderr
    )
