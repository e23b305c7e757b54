"""SIGTERM at any time ends a run in good order: with a checkpoint, or at once with nothing lost."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from moejax.train.stop_signal import StopSignal

ROOT = pathlib.Path(__file__).resolve().parents[2]
SMALL = ("prompts=()", "model.num_layers=1", "model.d_model=16", "sequence_length=32")

pytestmark = pytest.mark.slow

# The ordinary command; when it comes to a place for the n-th time, it tells and dawdles there.
VICTIM = """
import sys, time
place, count, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
passed = 0

def at(name):
    global passed
    passed += name == place
    if name == place and passed == count:
        print("here", flush=True)
        time.sleep(seconds)

from moejax.commands import main
from tests.reliability import victim

if place == "importing":
    import builtins
    imported = builtins.__import__
    def slow(name, *args, **kwargs):
        if name == "moejax.experiment":
            at("importing")
        return imported(name, *args, **kwargs)
    builtins.__import__ = slow
else:
    victim.wrap_all(at)
sys.exit(main(sys.argv[4:]))
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def start(cache, tmp_path):
    """Starts `moejax train` in `tmp_path / "run"`; it stops for a while at the n-th `place`."""
    started = []

    def start(place, *overrides, count=1, seconds=60, launcher=()):
        words = ("train", "configs/tiny.py:smoke", *SMALL, f"workdir={tmp_path / 'run'}")
        process = subprocess.Popen(
            [*launcher, sys.executable, "-c", VICTIM, place, str(count), str(seconds)]
            + [*words, *map(str, overrides)],
            cwd=ROOT,
            env=os.environ
            | {
                "MOEJAX_CACHE": str(cache),
                "PYTHONPATH": str(ROOT),
                "JAX_PLATFORMS": "cpu",
                "JAX_NUM_CPU_DEVICES": "1",
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "TMPDIR": str(tmp_path),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def ended(process, within=60.0):
    """(what it printed, seconds) of a process that ends with status 0 in so many seconds."""
    begin = time.monotonic()
    out, err = process.communicate(timeout=within)
    assert process.returncode == 0, f"status {process.returncode}\n{out}\n{err[-3000:]}"
    return out, time.monotonic() - begin


def terminate_at(process):
    assert "here\n" in process.stdout, process.stderr.read()  # reads on until it is there
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)


def steps(workdir):
    return sorted(int(p.name.removeprefix("step_")) for p in workdir.glob("checkpoints/step_*"))


def records(workdir, kind):
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if line["kind"] == kind]


@pytest.mark.parametrize(
    "place",
    [
        "importing",
        "before data preparation",
        "before restore or fresh state",
        "before step",  # the first: it is compiled here
        *(pytest.param(p, marks=pytest.mark.long) for p in ("before claim of the workdir",)),
    ],
)
def test_before_the_first_step_it_ends_at_once(start, tmp_path, place):
    """Whatever the main thread does: here it sleeps for a minute."""
    process = start(place)
    terminate_at(process)
    out, seconds = ended(process, within=10)
    assert "SIGTERM: nothing is lost" in out
    assert "the same command goes on" in out
    assert seconds < 5
    assert steps(tmp_path / "run") == []


def test_in_the_last_report_it_ends_at_once_with_everything_saved(start, tmp_path):
    process = start("before report")
    terminate_at(process)
    out, _ = ended(process, within=10)
    assert "SIGTERM: training is finished and saved" in out
    assert steps(tmp_path / "run") == [3]


def test_in_a_step_it_saves_at_the_end_of_it(start, tmp_path):
    process = start("before step", "steps=50", count=4, seconds=1.5)
    terminate_at(process)
    out, _ = ended(process)
    assert "SIGTERM: stopped at step 4 with a checkpoint" in out
    assert steps(tmp_path / "run") == [4]
    assert records(tmp_path / "run", "train") == [1, 2, 3, 4]


def test_in_a_save_it_finishes_the_save(start, tmp_path):
    process = start("after arrays handed over", "steps=50", "checkpoint_every=3", seconds=1.5)
    terminate_at(process)
    assert "SIGTERM: stopped at step 3 with a checkpoint" in ended(process)[0]
    assert steps(tmp_path / "run") == [3]


def test_in_an_evaluation_it_stops_between_batches_and_the_next_session_makes_up_for_it(
    start, tmp_path
):
    overrides = ("steps=6", "eval_every=3", "checkpoint_every=0")
    process = start("before batch", *overrides, count=5, seconds=1.5)
    terminate_at(process)
    assert "SIGTERM: stopped at step 3 with a checkpoint" in ended(process)[0]
    assert steps(tmp_path / "run") == [3]
    assert records(tmp_path / "run", "eval") == []
    ended(start("nowhere", *overrides))
    assert records(tmp_path / "run", "eval") == [3, 6]
    assert records(tmp_path / "run", "train") == [1, 2, 3, 4, 5, 6]


def test_a_step_longer_than_the_grace_period_does_not_outlive_it(start, tmp_path):
    process = start("before step", "steps=50", "checkpoint_every=2", "--grace", 4, count=4)
    terminate_at(process)
    out, seconds = ended(process, within=10)
    assert "SIGTERM: no checkpoint within 4 s" in out
    assert 2.5 < seconds < 4
    assert steps(tmp_path / "run") == [2]


@pytest.mark.parametrize("place, count", [("before step", 1), ("before step", 4)])
def test_two_processes_end_together_while_compiling_and_in_a_step(start, tmp_path, place, count):
    """The launcher hands the signal to both, as schedulers do."""
    overrides = ("mesh.data=2", "steps=50", "batch_size=4")
    launcher = ("launch/local.sh", "2", "1")
    process = start(place, *overrides, count=count, seconds=3, launcher=launcher)
    terminate_at(process)
    out, _ = ended(process, within=120)
    if count == 1:
        assert "SIGTERM: nothing is lost" in out
        assert steps(tmp_path / "run") == []
    else:
        assert "SIGTERM: stopped at step" in out
        (step,) = steps(tmp_path / "run")
        assert step in (4, 5, 6)


def test_in_a_library_a_signal_is_only_remembered():
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.received == "SIGTERM"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
