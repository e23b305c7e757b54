"""A full disk, and two runs in one folder: real ones, through the ordinary command."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests.reliability import outcome

ROOT = pathlib.Path(__file__).resolve().parents[2]
WORDS = (
    *("train", "configs/tiny.py:smoke", "prompts=()", "model.num_layers=1", "model.d_model=16"),
    *("sequence_length=32", "steps=8", "checkpoint_every=2", "keep_last=2"),
)

pytestmark = pytest.mark.slow

# The ordinary command; before its n-th step it tells, and goes on when it is told to.
PAUSED = """
import sys
count, passed = int(sys.argv[1]), 0

def at(name):
    global passed
    passed += name == "before step"
    if name == "before step" and passed == count:
        print("here", flush=True)
        sys.stdin.readline()

from moejax.commands import main
from tests.reliability import victim

victim.wrap_all(at)
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def start(cache):
    def start(*words, count=0):
        return subprocess.Popen(
            [sys.executable, "-c", PAUSED, str(count), *map(str, (*WORDS, *words))],
            cwd=ROOT,
            env=os.environ
            | {
                "MOEJAX_CACHE": str(cache),
                "PYTHONPATH": str(ROOT),
                "JAX_PLATFORMS": "cpu",
                "JAX_NUM_CPU_DEVICES": "1",
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def ended(process, status=0):
    out, err = process.communicate(timeout=300)
    assert process.returncode == status, f"status {process.returncode}\n{out}\n{err[-3000:]}"
    return err


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return tmp_path_factory.mktemp("whole") / "run"


@pytest.fixture
def reference(start, whole):
    """The folder of the run that nothing happened to."""
    if not whole.exists():
        ended(start(f"workdir={whole}"))
    return whole


def manifest(workdir, step):
    path = workdir / outcome.CHECKPOINTS / f"step_{step:08d}" / "manifest" / "manifest.json"
    content = json.loads(path.read_text())["content"]
    return content["leaves"], content["extra"]


def assert_same(workdir, reference):
    """Fingerprints of 64 bits of every leaf, which restoring and writing compute from the bits."""
    assert outcome.figures(workdir) == outcome.figures(reference)
    assert outcome.committed(workdir) == outcome.committed(reference) == [6, 8]
    for step in (6, 8):
        assert manifest(workdir, step) == manifest(reference, step)


@pytest.fixture
def small_disk(tmp_path):
    """A file system in memory of 700 kB, which two checkpoints fill."""
    folder = tmp_path / "disk"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no small file system can be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_stops_the_run_and_with_room_it_goes_on_bit_for_bit(
    start, small_disk, reference
):
    workdir = small_disk / "run"
    error = ended(start(f"workdir={workdir}"), status=2)
    assert "could not be written to" in error
    assert "the disk is full; earlier checkpoints are untouched (steps: 2" in error
    assert error.splitlines()[-1].startswith("error: ")
    assert outcome.committed(workdir)[0] == 2
    assert not outcome.leftovers(workdir / outcome.CHECKPOINTS)  # the disk needs the space
    subprocess.run(["mount", "-o", "remount,size=50m", str(small_disk)], check=True)
    ended(start(f"workdir={workdir}"))
    assert_same(workdir, reference)


def test_of_two_runs_in_one_folder_the_later_one_finishes_and_the_earlier_one_stops(
    start, tmp_path, reference
):
    workdir = tmp_path / "run"
    earlier = start(f"workdir={workdir}", count=6)  # step 4 is saved
    assert "here\n" in earlier.stdout
    ended(start(f"workdir={workdir}"))
    before = sorted(workdir.rglob("*"))
    error = ended(earlier, status=2)  # its next save would be that of step 6
    assert "error: another run now writes to" in error
    assert "this one stops and writes nothing more" in error
    events = workdir / "tensorboard"  # where every session has files of its own
    assert [p for p in sorted(workdir.rglob("*")) if events not in p.parents] == [
        p for p in before if events not in p.parents
    ]
    assert_same(workdir, reference)
