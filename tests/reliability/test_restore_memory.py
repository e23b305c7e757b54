"""Restoring takes little more memory than what is restored: measured, and under a limit."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
LEAVES, LEAF_BYTES = 64, 2**24
STATE = LEAVES * LEAF_BYTES

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status"),
]

SAVE = """
import sys, jax
from moejax.train.checkpoint import Checkpointer
folder, leaves, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
make = lambda i: jax.random.normal(jax.random.key(i), (size // 4096, 1024))
with Checkpointer(folder) as store:
    store.save(1, {f"w{i}": make(i) for i in range(leaves)}, {})
"""

RESTORE = """
import resource, sys, jax
from moejax.train import array_store
from moejax.train.checkpoint import Checkpointer
from moejax.train.fingerprint import fingerprints

folder, leaves, size, share, turns = sys.argv[1], *map(float, sys.argv[2:])
array_store._TURNS = int(turns)
where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
leaf = jax.ShapeDtypeStruct((int(size) // 4096, 1024), "float32", sharding=where)
fingerprints({"x": jax.numpy.ones(8)})  # starts the backend and its threads

def kilobytes(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))

with Checkpointer(folder) as store:
    before, allowed = kilobytes("VmRSS"), 1024 * kilobytes("VmData") + int(share * leaves * size)
    resource.setrlimit(resource.RLIMIT_DATA, (allowed, allowed))
    found = store.restore({f"w{i}": leaf for i in range(int(leaves))})
    assert len(found.state) == leaves
    print(1024 * (kilobytes("VmHWM") - before) / (leaves * size))
"""


def run(code, *words):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def test_restoring_takes_at_most_a_fifth_more_than_the_state(tmp_path):
    """1 GiB in 64 leaves. The limit counts address space, which threads reserve more of."""
    if shutil.disk_usage(tmp_path).free < 3 * STATE:
        pytest.skip(f"needs 3 GB on the disk of {tmp_path}")
    made = run(SAVE, tmp_path / "saved", LEAVES, LEAF_BYTES)
    assert made.returncode == 0, made.stderr[-3000:]
    restored = run(RESTORE, tmp_path / "saved", LEAVES, LEAF_BYTES, 1.5, 24)
    assert restored.returncode == 0, restored.stderr[-3000:]
    assert float(restored.stdout) <= 1.2
    at_once = run(RESTORE, tmp_path / "saved", LEAVES, LEAF_BYTES, 1.5, 1)
    assert at_once.returncode != 0  # the limit is one, and the turns are what keeps it
