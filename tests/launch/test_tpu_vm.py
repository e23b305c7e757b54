"""launch/tpu_vm.sh with a gcloud that writes down what it is asked."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / "launch" / "tpu_vm.sh"

GCLOUD = f"""#!{sys.executable}
import json, os, pathlib, sys
folder = pathlib.Path(os.environ["FAKE"])
with open(folder / "asked", "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
if "describe" in sys.argv:
    states = (folder / "states").read_text().split()
    print(states[0])
    (folder / "states").write_text(" ".join(states[1:]))
"""


@pytest.fixture
def fake(tmp_path):
    """A folder with `gcloud`, the states that a resource goes through, and what was asked."""
    gcloud = tmp_path / "gcloud"
    gcloud.write_text(GCLOUD)
    gcloud.chmod(0o755)
    (tmp_path / "states").write_text("ACTIVE")
    (tmp_path / "asked").write_text("")
    return tmp_path


def call(fake, *words):
    path = f"{fake}:{os.environ['PATH']}"
    settings = {"PATH": path, "FAKE": str(fake), "TPU_POLL_SECONDS": "0", "HOME": str(fake)}
    return subprocess.run(
        [SCRIPT, *words], env=settings, capture_output=True, text=True, timeout=60, check=False
    )


def asked(fake):
    return [json.loads(line) for line in (fake / "asked").read_text().splitlines()]


def test_one_slice_is_asked_for_and_waited_for(fake):
    (fake / "states").write_text("WAITING_FOR_RESOURCES PROVISIONING ACTIVE")
    done = call(fake, "--zone", "us-east5-a", "--project", "p", "create", "moe", "v5p-128")
    assert done.returncode == 0, done.stderr
    create, *polls = asked(fake)
    where = ["--zone", "us-east5-a", "--project", "p"]
    assert create == [
        *("compute", "tpus", "queued-resources", "create", "moe", *where, "--node-id", "moe"),
        *("--accelerator-type", "v5p-128", "--runtime-version", "v2-alpha-tpuv5"),
    ]
    assert len(polls) == 3
    assert all(poll[3:5] == ["describe", "moe"] for poll in polls)
    assert "moe is PROVISIONING" in done.stderr


def test_several_slices_that_can_be_taken_back(fake):
    words = ["--zone", "z", "--spot", "--runtime", "image", "create", "moe", "v6e-256", "2"]
    assert call(fake, *words).returncode == 0
    create = asked(fake)[0]
    assert create[create.index("--node-count") :] == [
        *("--node-count", "2", "--node-prefix", "moe", "--accelerator-type", "v6e-256"),
        *("--runtime-version", "image", "--spot"),
    ]


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
def test_what_was_not_granted_is_an_error_and_not_a_loop(fake, state):
    (fake / "states").write_text(f"PROVISIONING {state}")
    done = call(fake, "--zone", "z", "create", "moe", "v5p-8")
    assert done.returncode == 1
    assert f"moe is {state}: delete it and ask again" in done.stderr


def test_a_run_starts_on_all_hosts_of_all_slices_and_its_words_arrive_whole(fake):
    (fake / "moejax" / ".venv" / "bin").mkdir(parents=True)
    tool = fake / "moejax" / ".venv" / "bin" / "moejax"
    tool.write_text(
        '#!/bin/sh\necho "$$ $(cat ~/.moejax.pid)"; printf "%s\\n" "$@"\n'
        'echo "$MOEJAX_COORDINATOR $MOEJAX_WATCHDOG"\n'
    )
    tool.chmod(0o755)
    words = ["moejax", "train", "configs/tiny.py:smoke", "prompts=('a \"b\"', '$HOME')", "steps=5"]
    done = call(fake, "--zone", "z", "run", "moe", *words)
    assert done.returncode == 0, done.stderr
    ((*ssh, remote),) = asked(fake)
    assert ssh == [
        *("alpha", "compute", "tpus", "queued-resources", "ssh", "moe", "--zone", "z"),
        *("--node=all", "--worker=all", "--command"),
    ]
    environment = {"HOME": str(fake), "PATH": os.environ["PATH"]}
    out = subprocess.check_output(["bash", "-c", remote], cwd=fake, env=environment, text=True)
    pids, *arrived, settings = out.splitlines()
    assert pids.split()[0] == pids.split()[1]  # `stop` will ask the right process
    assert arrived == words[1:]
    assert settings == "auto on"


def test_stop_asks_the_process_that_runs(fake):
    process = subprocess.Popen(["sleep", "100"])
    (fake / ".moejax.pid").write_text(f"{process.pid}\n")
    assert call(fake, "--zone", "z", "stop", "moe").returncode == 0
    ((*_, remote),) = asked(fake)
    subprocess.run(["bash", "-c", remote], env={"HOME": str(fake), "PATH": "/bin"}, check=True)
    assert process.wait(10) == -15


def test_install_copies_and_then_installs(fake):
    assert call(fake, "--zone", "z", "install", "moe", ".").returncode == 0
    clear, copy, install = asked(fake)
    assert clear[-1] == "rm -rf moejax.new"
    assert copy[4:8] == ["scp", "--recurse", ".", "moe:moejax.new"]
    subprocess.run(["bash", "-n", "-c", install[-1]], check=True)
    assert "--constraint constraints.txt" in install[-1]


def test_a_second_install_takes_the_place_of_the_first_and_spares_runs(fake):
    assert call(fake, "--zone", "z", "install", "moe", ".").returncode == 0
    install = asked(fake)[-1][-1]
    python = fake / "python3.13"
    python.write_text("#!/bin/sh\nmkdir -p .venv/bin && ln -sf /bin/true .venv/bin/pip\n")
    python.chmod(0o755)
    home = fake / "home"
    for version in ("1", "2"):
        new = home / "moejax.new"
        for name in ("moejax", "runs", ".venv"):
            (new / name).mkdir(parents=True)
        (new / "moejax" / f"only_in_{version}.py").write_text("")
        (new / "a file").write_text(version)
        (new / ".hidden").write_text(version)
        path = f"{fake}:{os.environ['PATH']}"
        subprocess.run(["bash", "-c", install], cwd=home, env={"PATH": path}, check=True)
        (home / "moejax" / "runs").mkdir(exist_ok=True)
        (home / "moejax" / "runs" / f"run_{version}").write_text("")
    found = sorted(str(p.relative_to(home)) for p in home.rglob("*") if p.is_file())
    assert found == [
        *("moejax/.hidden", "moejax/.venv/bin/pip", "moejax/a file", "moejax/moejax/only_in_2.py"),
        *("moejax/runs/run_1", "moejax/runs/run_2"),
    ]
    assert (home / "moejax" / "a file").read_text() == "2"


def test_delete(fake):
    assert call(fake, "--zone", "z", "delete", "moe").returncode == 0
    assert asked(fake) == [
        [
            "compute",
            "tpus",
            "queued-resources",
            "delete",
            "moe",
            "--zone",
            "z",
            "--force",
            "--quiet",
        ]
    ]


@pytest.mark.parametrize(
    "words", [["create", "moe", "v5p-8"], ["run", "moe", "true"], ["delete", "moe"]]
)
def test_a_dry_run_asks_nothing_and_prints_what_it_would(fake, words):
    done = call(fake, "--zone", "z", "--dry-run", *words)
    assert done.returncode == 0
    assert done.stdout.startswith("gcloud ")
    assert done.stdout.count("\n") == 1
    assert not asked(fake)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "NAME TYPE"),
        (["create", "moe", "v5p-8"], "name the zone"),
        (["--zone", "z", "create", "moe"], "NAME TYPE"),
        (["--zone", "z", "create", "Moe", "v5p-8"], "no name of a resource"),
        (["--zone", "z", "create", "moe", "v5p-8", "x"], "no number of slices"),
        (["--zone", "z", "create", "moe", "v99-8"], "which image has v99-8"),
        (["--zone", "z", "run", "moe"], "NAME TYPE"),
        (["--zone", "z", "--fast", "run", "moe", "true"], "NAME TYPE"),
        (["--zone", "z", "walk", "moe"], "NAME TYPE"),
    ],
)
def test_wrong_words_are_one_clear_error(fake, words, message):
    done = call(fake, *words)
    assert done.returncode == 2
    assert message in done.stderr
    assert not asked(fake)
