"""Starts commands under a watchdog, and hangs that only the kernel can end."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]

# A parent that is as impatient as a test.
PARENT = """
import sys
from moejax.watchdog.parent import watch
sys.exit(watch(sys.argv[1:], grace=0.7, heartbeat_every=0.1))
"""

# With the interpreter's lock held: no handler and no other thread of the process runs any more.
STUCK = """
import ctypes

def stuck_in_c():
    while True:
        ctypes.PyDLL(None).sleep(1000)
"""


def environment(setting, **more):
    return os.environ | {"PYTHONPATH": str(ROOT), "MOEJAX_WATCHDOG": setting} | more


def start(code, *words, setting="on", **more):
    """A Python child with this code, and its watchdog; as `subprocess.Popen`."""
    command = [sys.executable, "-c", PARENT, sys.executable, "-c", STUCK + code, *words]
    return subprocess.Popen(
        command,
        env=environment(setting, **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process, seconds=60):
    """(status, stdout, stderr)"""
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err
