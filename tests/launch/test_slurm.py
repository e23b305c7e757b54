"""launch/slurm.sh on a real Slurm of two nodes: stopped, requeued, and what it computes."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import pytest

from moejax.train.checkpoint import Checkpointer
from tests.launch.test_several_processes import STREAM

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "slurm.sh"
STEPS = 40
MOEJAX = (sys.executable, "-m", "moejax")
WORDS = (
    *("train", "configs/tiny.py:smoke"),
    *("mesh.data=2", "mesh.expert=4", "batch_size=8", f"steps={STEPS}", "log_every=1"),
    *("checkpoint_every=0", "prompts=()"),
)
TRAIN = (*MOEJAX, *WORDS)


def why_not():
    """Why no job can run here, or None."""
    if not shutil.which("sinfo"):
        return "Slurm is not installed"
    asked = subprocess.run(
        ["sinfo", "-h", "-r", "-o", "%D"], capture_output=True, text=True, timeout=60, check=False
    )
    nodes = sum(map(int, asked.stdout.split()))
    if asked.returncode or nodes < 2:
        return f"Slurm has {nodes} nodes that respond, and two are needed: {asked.stderr.strip()}"
    return None


pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module", autouse=True)
def slurm():
    if reason := why_not():
        pytest.skip(reason)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("slurm")


@pytest.fixture(scope="module")
def environment(folder):
    changed = {"MOEJAX_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    return os.environ | changed


class Job:
    """A batch job on two nodes with four simulated devices each; cancelled where a test ends."""

    def __init__(self, folder, environment, *words, script_words=("cpus:4",)):
        self.log = folder / f"job-{time.monotonic_ns()}.log"
        options = ["--nodes=2", f"--output={self.log}", "--parsable", f"--chdir={ROOT}"]
        command = ["sbatch", *options, str(SCRIPT), *script_words, *map(str, words)]
        self.number = subprocess.check_output(command, text=True, env=environment).strip()

    def fact(self, name):
        """One field of what Slurm knows of the job."""
        command = ["scontrol", "show", "job", self.number, "--oneliner"]
        words = subprocess.check_output(command, text=True).split()
        return next(word.partition("=")[2] for word in words if word.startswith(f"{name}="))

    def wait(self, *states, seconds=600):
        deadline = time.monotonic() + seconds
        while (state := self.fact("JobState")) not in states:
            ended = state in ("COMPLETED", "FAILED", "TIMEOUT", "NODE_FAIL", "CANCELLED")
            assert not ended, f"{state}\n{self.output()}"
            assert time.monotonic() < deadline, f"{state}\n{self.output()}"
            time.sleep(0.2)

    def wait_for_queue(self, seconds=400):
        """Waits until the job is back in the queue, where Slurm holds it for two minutes."""
        deadline = time.monotonic() + seconds
        while self.fact("Restarts") == "0":
            state = self.fact("JobState")
            assert state in ("PENDING", "RUNNING", "COMPLETING"), f"{state}\n{self.output()}"
            assert time.monotonic() < deadline, f"{state}\n{self.output()}"
            time.sleep(0.5)

    def start_again(self):
        """Like `wait_for_queue`, and shortens the two minutes.

        Not after a step that was killed: Slurm may kill the new step, which has the same number,
        a minute later once more.
        """
        self.wait_for_queue()
        while self.fact("JobState") == "PENDING":
            command = ["scontrol", "update", f"JobId={self.number}", "StartTime=now"]
            subprocess.run(command, check=False, capture_output=True, timeout=60)
            time.sleep(0.5)

    def output(self):
        return self.log.read_text() if self.log.exists() else ""

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        subprocess.run(["scancel", self.number], check=False, capture_output=True)


def records(workdir):
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def losses(workdir):
    return {r["step"]: r["values"]["loss"] for r in records(workdir) if r["kind"] == "train"}


def fingerprints(workdir):
    """Of every leaf of the last checkpoint; layouts make no difference to them."""
    with Checkpointer(str(workdir / "checkpoints")) as checkpointer:
        leaves = checkpointer.manifest(STEPS).leaves
    assert leaves
    return {path: leaf.fingerprint for path, leaf in leaves.items()}


@pytest.fixture(scope="module")
def uninterrupted(folder, environment):
    """The workdir of a run through Slurm that nothing has stopped."""
    workdir = folder / "uninterrupted"
    with Job(folder, environment, *TRAIN, f"workdir={workdir}") as job:
        job.wait("COMPLETED")
        assert job.fact("Restarts") == "0"
        assert "goodput" in job.output()
    return workdir


def test_stopped_and_requeued_it_ends_bit_for_bit_as_the_uninterrupted_run(
    folder, environment, uninterrupted
):
    workdir = folder / "stopped"
    with Job(folder, environment, *TRAIN, f"workdir={workdir}") as job:
        deadline = time.monotonic() + 300
        while len(losses(workdir)) < 5:
            assert time.monotonic() < deadline, job.output()
            time.sleep(0.05)
        subprocess.run(["scancel", "--signal=TERM", job.number], check=True)
        job.start_again()
        job.wait("COMPLETED")
        assert job.fact("Restarts") == "1"
        output = job.output()
    assert "SIGTERM: stopped at step" in output
    assert "asked to stop; back into the queue (restart 1)" in output
    (resumed,) = (r["step"] for r in records(workdir) if r["values"].get("event") == "resumed")
    assert 5 <= resumed < STEPS
    assert losses(workdir) == losses(uninterrupted)
    assert sorted(losses(workdir)) == list(range(1, STEPS + 1))
    assert fingerprints(workdir) == fingerprints(uninterrupted)


def test_a_process_that_is_stuck_is_named_and_the_job_requeued(folder, environment, uninterrupted):
    workdir = folder / "stuck"
    planted = (sys.executable, ROOT / "tests" / "watchdog" / "planted.py", "data")
    settings = {"MOEJAX_WATCHDOG": "data=30", "PLANT_PROCESS": "1"}
    with Job(folder, environment | settings, *planted, *WORDS, f"workdir={workdir}") as job:
        job.wait_for_queue()
        job.wait("COMPLETED", seconds=900)
        assert job.fact("Restarts") == "1"
        output = job.output()
    assert "in stuck_in_c" in output
    assert "in phase 'data' of step 2, is behind" in output
    assert "process 1 ended with status 75; back into the queue" in output
    assert fingerprints(workdir) == fingerprints(uninterrupted)


def test_its_losses_are_those_of_one_process(folder, environment, uninterrupted):
    alone = folder / "alone"
    subprocess.run(
        [*TRAIN, f"workdir={alone}"],
        cwd=ROOT,
        env=environment | {"JAX_NUM_CPU_DEVICES": "8"},
        check=True,
        capture_output=True,
        timeout=600,
    )
    expected, found = losses(alone), losses(uninterrupted)
    assert found.keys() == expected.keys()
    for step, loss in expected.items():
        assert found[step] == pytest.approx(loss, abs=1e-5), step


def test_its_token_stream_is_that_of_one_process(folder, environment):
    streams = []
    (folder / "two").mkdir()
    (folder / "one").mkdir()
    with Job(folder, environment, sys.executable, "-c", STREAM, folder / "two") as job:
        job.wait("COMPLETED")
    subprocess.run(
        [sys.executable, "-c", STREAM, folder / "one"],
        cwd=ROOT,
        env=environment | {"JAX_NUM_CPU_DEVICES": "8"},
        check=True,
        timeout=600,
    )
    for name, count in (("two", 2), ("one", 1)):
        parts = [p.read_text().splitlines() for p in sorted((folder / name).glob("*.txt"))]
        assert len(parts) == count
        streams.append(sorted(sum(parts, [])))
    assert len(streams[0]) == 21 * 5 * 8
    assert streams[0] == streams[1]


@pytest.mark.parametrize(
    ("status", "restarts"),
    [(2, 0), (75, 1), (137, 1), (85, 1)],  # a user's mistake; stuck; killed; stopped
)
def test_what_is_worth_another_try_is_requeued(folder, environment, status, restarts):
    """Process 1 ends with the status, and process 0 never, in the first session."""
    code = (
        "[ ${SLURM_RESTART_COUNT:-0} = 0 ] || exit 0; "
        f"[ $SLURM_PROCID = 1 ] && exit {status}; [ {status} = 85 ] && exit 0; exec sleep 600"
    )
    with Job(folder, environment, "bash", "-c", code) as job:
        if restarts:
            job.start_again()
            job.wait("COMPLETED")
        else:
            job.wait("FAILED")
            assert job.fact("ExitCode") == f"{status}:0"
        assert job.fact("Restarts") == str(restarts)


def test_gpus_without_gpus_is_an_error(folder, environment):
    with Job(folder, environment, "true", script_words=("gpus",)) as job:
        job.wait("FAILED")
        assert "--gpus-per-node" in job.output()


def until(condition, seconds=100):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_cancelled_job_does_not_come_back_and_leaves_nothing(folder, environment):
    with Job(folder, environment, "sleep", "600") as job:
        job.wait("RUNNING")
        left = ROOT / f".moejax-{job.number}.ended"
        until(left.exists)
        subprocess.run(["scancel", job.number], check=True)
        until(lambda: not left.exists())
        time.sleep(15)  # longer than Slurm waits before it kills
        assert job.fact("JobState") == "CANCELLED"
        assert job.fact("Restarts") == "0"
