"""launch/local.sh by itself, with commands that are no trainer."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "launch" / "local.sh")


# Where the tests run in the background, SIGINT is ignored, and a shell cannot undo that.
HEED_SIGNALS = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""


@pytest.fixture
def launch(tmp_path):
    """Starts the script with a shell command per process; its logs are below `tmp_path`.

    What a failed test leaves running is killed.
    """
    started = []

    def start(num_processes, command):
        process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                HEED_SIGNALS,
                SCRIPT,
                str(num_processes),
                "3",
                "bash",
                "-c",
                command,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"TMPDIR": str(tmp_path)},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        for _ in range(2):  # the first asks, the second kills
            if process.poll() is None:
                process.terminate()
                time.sleep(0.5)


def ended(process, seconds=30):
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


def test_its_syntax():
    subprocess.run(["bash", "-n", SCRIPT], check=True)


def test_each_process_is_told_what_it_is(launch, tmp_path):
    command = 'echo "$MOEJAX_PROCESS_ID $MOEJAX_NUM_PROCESSES $MOEJAX_COORDINATOR" > {}/told-$$; '
    command += 'echo "$JAX_PLATFORMS $JAX_NUM_CPU_DEVICES"; echo "[Gloo] Rank 0 is connected"'
    status, out, _ = ended(launch(3, command.format(tmp_path)))
    assert status == 0
    assert out == "cpu 3\n"  # the first process alone, without the transport's reports
    told = sorted(path.read_text().split() for path in tmp_path.glob("told-*"))
    assert [(number, count) for number, count, _ in told] == [("0", "3"), ("1", "3"), ("2", "3")]
    (address,) = {address for *_, address in told}
    assert address.startswith("127.0.0.1:")


def test_the_watchdog_is_on_unless_it_is_turned_off(launch, monkeypatch):
    monkeypatch.delenv("MOEJAX_WATCHDOG", raising=False)
    assert ended(launch(1, 'echo "$MOEJAX_WATCHDOG"'))[1] == "on\n"
    monkeypatch.setenv("MOEJAX_WATCHDOG", "off")
    assert ended(launch(1, 'echo "$MOEJAX_WATCHDOG"'))[1] == "off\n"


def test_a_clean_run_leaves_no_logs(launch, tmp_path):
    assert ended(launch(2, "true"))[0] == 0
    assert not list(tmp_path.iterdir())


def test_the_first_failure_is_shown_and_ends_the_others(launch, tmp_path):
    command = (
        'if [ $MOEJAX_PROCESS_ID = 1 ]; then echo "what went wrong"; exit 7; fi; exec sleep 600'
    )
    start = time.monotonic()
    status, _, err = ended(launch(3, command))
    assert status == 7
    assert time.monotonic() - start < 20
    assert "process 1 of 3 failed with status 7" in err
    assert "what went wrong" in err
    assert list(tmp_path.glob("moejax-local.*/process-1.log"))


def test_a_killed_process_ends_the_run_with_a_message(launch):
    command = "if [ $MOEJAX_PROCESS_ID = 1 ]; then kill -KILL $$; fi; exec sleep 600"
    status, _, err = ended(launch(2, command))
    assert status == 128 + signal.SIGKILL
    assert f"process 1 of 2 failed with status {status}" in err


def test_of_two_failures_the_first_counts(launch):
    command = "if [ $MOEJAX_PROCESS_ID = 1 ]; then exit 3; fi; sleep 1; exit 4"
    assert ended(launch(2, command))[0] == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_all_and_a_clean_end_is_a_success(launch, tmp_path, number):
    command = f"trap 'echo saved; touch {tmp_path}/saved-$$; exit 0' TERM; touch {tmp_path}/on-$$; "
    process = launch(2, command + "while :; do sleep 0.1; done")
    while len(list(tmp_path.glob("on-*"))) < 2:
        time.sleep(0.05)
    process.send_signal(number)
    status, out, err = ended(process)
    assert status == 0
    assert out == "saved\n"
    assert "asking 2 processes to stop" in err
    assert len(list(tmp_path.glob("saved-*"))) == 2


def test_a_second_signal_kills(launch, tmp_path):
    command = f"trap '' TERM; touch {tmp_path}/on-$$; while :; do sleep 0.1; done"
    process = launch(2, command)
    while len(list(tmp_path.glob("on-*"))) < 2:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == 130


@pytest.mark.parametrize("words", [[], ["2"], ["2", "4"], ["0", "4", "true"], ["2", "x", "true"]])
def test_wrong_arguments_show_the_usage(words):
    done = subprocess.run([SCRIPT, *words], capture_output=True, text=True)
    assert done.returncode == 2
    assert "launch/local.sh NUM_PROCESSES DEVICES_PER_PROCESS COMMAND..." in done.stderr


def test_a_command_that_is_missing_is_named():
    done = subprocess.run([SCRIPT, "2", "1", "no-such-command"], capture_output=True, text=True)
    assert done.returncode == 127
    assert "no-such-command" in done.stderr
