"""The watchdog with children that are no trainers: hangs, signals, deaths, and who is behind."""

import os
import re
import signal
import time

import pytest

from moejax.errors import UserError
from moejax.watchdog.deadlines import DEADLINES, parse
from moejax.watchdog.parent import EXPIRED, wanted
from tests.watchdog.watched import ended, start

HANG = """
import sys
from moejax.train import phases
phases.begin()
phases.enter("step", 6)
with phases.phase(sys.argv[1], 7):
    stuck_in_c()
"""


@pytest.mark.parametrize(
    "phase", [p if p == "step" else pytest.param(p, marks=pytest.mark.slow) for p in DEADLINES]
)
def test_a_hang_in_any_phase_is_ended_with_its_stack(phase):
    began = time.monotonic()
    setting = ",".join(f"{p.replace(' ', '_')}={1 if p == phase else 500}" for p in DEADLINES)
    status, _, err = ended(start(HANG, phase, setting=setting))
    assert status == EXPIRED
    assert f"in phase '{phase}' of step 7 for 1 s without news" in err
    assert re.search(r'File "<string>", line \d+ in stuck_in_c', err)
    assert time.monotonic() - began < 20


def test_a_hang_before_the_first_import_is_ended():
    status, _, err = ended(start("stuck_in_c()", setting="start=0.5"))
    assert status == EXPIRED
    assert "in phase 'start' of step 0" in err


@pytest.mark.slow
def test_one_phase_after_the_other_and_news_within_one_renew_the_deadline():
    code = """
import time
from moejax.train import phases
phases.begin()
for phase in ("prepare", "step", "step", "step", "exit"):
    phases.enter(phase)
    time.sleep(0.6)
"""
    status, _, err = ended(start(code, setting="prepare=2,step=2,exit=2,start=20"))
    assert (status, err) == (0, "")
    status, _, err = ended(start(code.replace("0.6", "4"), setting="prepare=20,step=2,start=20"))
    assert status == EXPIRED
    assert "in phase 'step'" in err


def test_stacks_of_all_threads_are_printed():
    code = """
import threading, time
from moejax.train import phases
phases.begin()
def reads_batches():
    time.sleep(1000)
threading.Thread(target=reads_batches, daemon=True).start()
phases.enter("data")
time.sleep(1000)
"""
    _, _, err = ended(start(code, setting="data=1"))
    assert "in reads_batches" in err
    assert "in <module>" in err


IGNORES = """
import os, signal, sys, time
for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"):
    signal.signal(getattr(signal, name), signal.SIG_IGN)
print(os.getpid(), flush=True)
time.sleep(1000)
"""


def test_a_child_that_ignores_signals_is_killed():
    process = start(IGNORES, setting="start=2")
    child = int(process.stdout.readline())
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == EXPIRED
    assert not os.path.exists(f"/proc/{child}")


@pytest.mark.parametrize(
    ("code", "status"),
    [("", 0), ("import sys; sys.exit(3)", 3), ("import os; os.kill(os.getpid(), 9)", 137)],
)
def test_the_childs_status_is_the_status(code, status):
    assert ended(start(code)) == (status, "", "")


# It writes past the buffer of `print`, which a handler must not enter a second time, and sleeps in
# turns: a signal between the interpreter's last look and a sleep is heard when that sleep ends.
TELLS_SIGNAL = """
import os, signal, sys, time
def heard(number, frame):
    os.write(1, f"{signal.Signals(number).name}\\n".encode())
    sys.exit(int(sys.argv[1]))
for name in ("SIGTERM", "SIGINT", "SIGUSR2"):
    signal.signal(getattr(signal, name), heard)
os.write(1, b"on\\n")
while True:
    time.sleep(0.1)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
@pytest.mark.parametrize("status", [0, 4])
def test_a_signal_is_passed_on_and_the_status_back(number, status):
    process = start(TELLS_SIGNAL, str(status))
    process.stdout.readline()
    process.send_signal(number)
    assert ended(process)[:2] == (status, number.name + "\n")


@pytest.mark.parametrize(
    ("given", "number", "status"),
    [("0", signal.SIGTERM, 85), ("4", signal.SIGTERM, 4), ("0", signal.SIGINT, 0)],
)
def test_an_orderly_stop_can_have_a_status_of_its_own(given, number, status):
    process = start(TELLS_SIGNAL, given, MOEJAX_STOPPED_STATUS="85")
    process.stdout.readline()
    process.send_signal(number)
    assert ended(process)[0] == status


def test_a_sigterm_that_kills_the_child_early_is_a_stop_too():
    code = "import time; print('on', flush=True); time.sleep(1000)"
    process = start(code, MOEJAX_STOPPED_STATUS="85")
    process.stdout.readline()
    process.terminate()
    assert ended(process)[0] == 85


def test_usr1_prints_the_stacks_and_the_child_goes_on():
    code = """
import time
from moejax.train import phases
phases.begin()
def works():
    print("on", flush=True)
    time.sleep(2)
works()
"""
    process = start(code)
    process.stdout.readline()
    process.send_signal(signal.SIGUSR1)
    status, _, err = ended(process)
    assert status == 0
    assert "in works" in err


def test_the_child_dies_with_its_parent():
    process = start(IGNORES)
    child = int(process.stdout.readline())
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/{child}"):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_childs_own_children_are_killed_with_it():
    code = """
import subprocess, sys, time
print(subprocess.Popen(["sleep", "1000"]).pid, flush=True)
time.sleep(1000)
"""
    process = start(code, setting="start=2")
    grandchild = int(process.stdout.readline())
    assert ended(process)[0] == EXPIRED
    with (
        open(f"/proc/{grandchild}/stat")
        if os.path.exists(f"/proc/{grandchild}")
        else open(os.devnull) as stat
    ):
        assert stat.read().split(" ")[2:3] in ([], ["Z"])  # gone, or a zombie of another parent


PEER = """
import sys, time
from moejax.train import phases
phases.begin()
folder, me, hangs = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
phases.current().announce(
    folder=folder, session="s", process=me, num_processes=3, host=f"host{me}"
)
for step in range(8):
    with phases.phase("data", step):
        if (me, step) == (hangs, 5):
            stuck_in_c()
    phases.enter("step", step)
    if (hangs, step) != (me, 5) and step == 5:
        time.sleep(1000)  # waits for the one that hangs
"""


@pytest.mark.parametrize("expires_first", ["data", "step"])
def test_every_watchdog_names_the_process_that_hangs_in_loading_data(tmp_path, expires_first):
    (tmp_path / "process-0.json").write_text('{"session": "before", "count": 0}')
    setting = ",".join(f"{p}={2 if p == expires_first else 5}" for p in ("data", "step"))
    peers = [start(PEER, str(tmp_path), str(p), "1", setting=setting) for p in range(3)]
    for process in peers:
        status, _, err = ended(process)
        assert status == EXPIRED
        assert "process 1 (on host1), in phase 'data' of step 5, is behind" in err
        assert "the first is in phase 'step' of step 5" in err


def test_where_all_are_equal_nobody_is_accused(tmp_path):
    peers = [start(PEER, str(tmp_path), str(p), "9", setting="step=2") for p in range(3)]
    for process in peers:
        assert (
            "no process is behind another: all are in phase 'step' of step 5" in ended(process)[2]
        )


def test_a_process_that_never_came_is_named(tmp_path):
    (tmp_path / "process-2.json").write_text("{")
    peers = [start(PEER, str(tmp_path), str(p), "9", setting="step=2") for p in range(2)]
    assert "process 2 of 3 not heard of in this session" in ended(peers[0])[2]
    ended(peers[1])


def test_deadlines_can_be_changed_one_by_one():
    assert parse("on") == DEADLINES
    assert parse("step=5, first_step=7.5") == DEADLINES | {"step": 5, "first step": 7.5}


@pytest.mark.parametrize(
    ("text", "message"),
    [("stepp=5", "no phase"), ("step", "above 0"), ("step=0", "above 0"), ("yes", "no phase")],
)
def test_a_setting_that_means_nothing_is_an_error(text, message):
    with pytest.raises(UserError, match=message):
        parse(text)


def test_who_wants_a_watchdog():
    assert wanted({"MOEJAX_WATCHDOG": "on"})
    assert wanted({"MOEJAX_WATCHDOG": "step=5"})
    for settings in ({}, {"MOEJAX_WATCHDOG": "off"}, {"MOEJAX_WATCHDOG": ""}):
        assert not wanted(settings)
    assert not wanted({"MOEJAX_WATCHDOG": "on", "MOEJAX_WATCHDOG_PIPE": "7"})


def test_the_parent_imports_nothing_heavy():
    code = "import sys, moejax.watchdog.parent, moejax.train.phases; print('jax' in sys.modules)"
    assert ended(start(code))[1] == "False\n"
