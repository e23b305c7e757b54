"""A run that is killed anywhere, again and again, ends as the run that nobody killed."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="file events are watched through inotify"
)


def rig(folder, *, kills, seed, seconds):
    """The results of so many kills; fails where any of the runs was not as if nothing was."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "MOEJAX_CACHE": str(ROOT / ".cache" / "rig"),
        "PYTHONPATH": str(ROOT),
    }
    print(f"{kills} kills from seed {seed}")
    words = [folder, "--kills", kills, "--seed", seed]
    done = subprocess.run(
        [sys.executable, "-m", "tests.reliability.rig", *map(str, words)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    print(done.stdout[-20000:], done.stderr[-5000:])
    assert done.returncode == 0
    found = json.loads((folder / "results.json").read_text())
    assert not found["failures"]
    return found["results"]


@pytest.mark.slow
def test_twenty_kills_lose_nothing(tmp_path):
    results = rig(tmp_path / "rig", kills=20, seed=20, seconds=1800)
    assert len(results) >= 17  # a file event or a time may lie beyond the end of its run
    assert any(result["before"] for result in results)  # some of them were restarts


@pytest.mark.long
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_two_hundred_kills_lose_nothing(tmp_path, seed):
    """At every place before and after every phase, at file events and at random times."""
    assert len(rig(tmp_path / "rig", kills=80, seed=seed, seconds=7200)) >= 70
