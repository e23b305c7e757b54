"""Real processes on this machine: together they compute what one process computes."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
MOEJAX = (sys.executable, "-m", "moejax")
SMOKE = "configs/tiny.py:smoke"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("cache"))
    return os.environ | {
        "MOEJAX_CACHE": cache,
        "PYTHONPATH": str(ROOT),
        "JAX_NUM_CPU_DEVICES": "8",
        "TMPDIR": cache,
    }


@pytest.fixture
def start(environment):
    """Starts a command; with `across`, in so many processes that share eight devices."""

    def start(*words, across=None):
        launcher = ("launch/local.sh", str(across), str(8 // across)) if across else ()
        return subprocess.Popen(
            [*launcher, *map(str, words)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def ended(process, status=0):
    """(stdout, stderr) of a process that must end with `status`."""
    out, err = process.communicate(timeout=600)
    assert process.returncode == status, f"status {process.returncode}\n{out}\n{err}"
    return out, err


def losses(workdir):
    """{(step, name): value} of every loss, of training and evaluation."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {
        (line["step"], name): value
        for line in lines
        if line["kind"] in ("train", "eval")
        for name, value in line["values"].items()
        if "loss" in name
    }


def choices_of_owners(workdir, num_owners):
    """The shares of the choices that go to each owner's experts, [steps, layers, owners]."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    values = [line["values"] for line in lines if line["kind"] == "train"]
    assert not np.any([v["router/dropped"] for v in values])
    load = np.asarray([v["router/load"] for v in values])
    return load.reshape(*load.shape[:2], num_owners, -1).sum(-1)


LEAST_LOADED = (
    *("model.block.ffn.num_experts=8", "mesh.data=1", "mesh.fsdp=2", "mesh.expert=4"),
    "model.block.ffn.transport=moejax.transport.least_loaded:LeastLoaded",
    *("model.block.ffn.transport.min_chunk=1", "model.block.ffn.transport.skip_below=1.0"),
)


@pytest.mark.long
def test_two_processes_train_as_one_and_one_resumes_them(start, tmp_path):
    """20 steps in two processes, four more and the evaluation in one; against 24 in one.

    Experts move, and the processes, which hold the two halves of the axis fsdp, agree on when.
    """
    overrides = (*LEAST_LOADED, "batch_size=8", "prompts=()", "steps=24", "log_every=1")
    train = (*MOEJAX, "train", SMOKE, *overrides)
    two, one = tmp_path / "two", tmp_path / "one"
    together = start(*train, f"workdir={two}", "--until", 20, across=2)
    alone = start(*train, f"workdir={one}")
    out, _ = ended(together)
    assert "--until 20: stopped at step 20" in out
    ended(alone)
    assert max(step for step, _ in losses(two)) == 20
    ended(start(*MOEJAX, "train", two))
    found, expected = losses(two), losses(one)
    assert found.keys() == expected.keys()
    assert len({step for step, name in found if name == "loss"}) == 24
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, abs=1e-5), key
    out, _ = ended(start(*MOEJAX, "evaluate", one, across=2))
    (line,) = (line for line in out.splitlines() if line.split()[0] == "loss")
    assert float(line.split()[1]) == pytest.approx(expected[24, "eval/loss"], abs=2e-5)
    assert choices_of_owners(two, 4).max() > 1.3 / 4


# What every device gets of the first batches and of the last, as one line per device and step.
STREAM = """
import sys, hashlib, jax
from moejax.config.build import build_config
from moejax.config.load import load_config
from moejax.config.overrides import apply_overrides
from moejax.train import layout, loop, processes

with processes.joined():
    overrides = ["mesh.expert=2", "mesh.fsdp=2", "mesh.data=2", "batch_size=8"]
    experiment = build_config(apply_overrides(load_config("configs/tiny.py:smoke"), overrides))
    data, mesh = loop.prepare_data(experiment), experiment.mesh.build()
    lines = []
    for step in (*range(20), 1000):
        for name, x in vars(layout.global_batch(data.train.batch(step), mesh)).items():
            for shard in [] if x is None else x.addressable_shards:
                digest = hashlib.sha256(jax.device_get(shard.data).tobytes()).hexdigest()
                position = mesh.devices.flatten().tolist().index(shard.device)
                lines.append(f"{step} {name} {position} {digest}")
    with open(f"{sys.argv[1]}/{jax.process_index()}.txt", "w") as file:
        file.write("\\n".join(lines) + "\\n")
"""


def test_the_token_stream_is_the_same_bit_for_bit(start, tmp_path):
    streams = []
    for across, name in ((2, "two"), (None, "one")):
        (tmp_path / name).mkdir()
        ended(start(sys.executable, "-c", STREAM, tmp_path / name, across=across))
        parts = [p.read_text().splitlines() for p in sorted((tmp_path / name).glob("*.txt"))]
        assert len(parts) == (across or 1)
        streams.append(sorted(sum(parts, [])))
    assert len(streams[0]) == 21 * 5 * 8
    assert streams[0] == streams[1]


@pytest.mark.long
def test_verify_passes_across_processes(start):
    """Every process computes the oracle by itself; the mesh spans both."""
    small = ("model.num_layers=1", "model.dtype=float64", "model.param_dtype=float64")
    small += ("model.block.ffn.num_experts=8",)  # one on each device, four in each process
    only = ("--only", "data=2 fsdp=2 expert=2", "--only", "least_loaded on expert=8")
    out, _ = ended(start(*MOEJAX, "verify", SMOKE, *small, *only, across=2))
    assert "all 2 comparisons agree" in out


def test_a_config_that_differs_is_an_error_that_names_the_path(start, tmp_path):
    words = " ".join((*MOEJAX, "train", SMOKE, f"workdir={tmp_path / 'run'}"))
    command = words + " steps=$((3 + MOEJAX_PROCESS_ID)) mesh.data=4"
    _, err = ended(start("bash", "-c", command, across=2), status=2)
    assert "process 1 (on " in err
    assert "steps is 3 in process 0 and 4 in process 1:" in err
    assert not (tmp_path / "run").exists()


SIGNAL = """
import signal, jax
from moejax.train import processes
from moejax.train.signals import AgreedStop, StopSignal

with processes.joined(), StopSignal() as stop:
    agreed = AgreedStop(stop, jax.make_mesh((8,), ("data",)))
    for step in range(10):
        if step == 3 and not processes.is_first():
            signal.raise_signal(signal.SIGTERM)
        if name := agreed.poll():
            break
    assert processes.from_first([step]) == [step]
    print(name, step)
"""


def test_a_signal_to_one_process_stops_all_at_the_same_step(start):
    out, _ = ended(start(sys.executable, "-c", SIGNAL, across=2))
    assert out.split() == ["SIGTERM", "4"]


JOIN_AND_DIE = """
import os, signal
from moejax.train import processes

with processes.joined():
    processes.barrier("both are here")
    if not processes.is_first():
        os.kill(os.getpid(), signal.SIGKILL)
    processes.barrier("never")
"""


def test_a_killed_process_does_not_leave_the_others_waiting(start):
    _, err = ended(start(sys.executable, "-c", JOIN_AND_DIE, across=2), status=137)
    assert "process 1 of 2 failed with status 137; the others were ended" in err


JOIN_AND_FAIL = """
import jax
from moejax.errors import UserError
from moejax.train import processes

with processes.joined():
    processes.barrier("both are here")
    if not processes.is_first():
        raise UserError("this one cannot go on")
    processes.barrier("never")
"""


def test_an_error_in_one_process_ends_it_at_once(start):
    """Left to itself, JAX would wait at exit for the process that waits for this one."""
    _, err = ended(start(sys.executable, "-c", JOIN_AND_FAIL, across=2), status=2)
    assert "error: this one cannot go on" in err
