"""What a run's folder holds is data: loading it unpickles nothing and executes nothing."""

import ast
import json
import os
import pathlib
import pickle
import re
import shutil
import subprocess
import sys

import pytest

from moejax.commands import main

ROOT = pathlib.Path(__file__).resolve().parents[2]
SMALL = ("prompts=()", "model.num_layers=1", "model.d_model=16", "sequence_length=32", "steps=2")
SERIALISERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}

# Files that may name what no other may, and why.
PICKLE = {"moejax/interop/torch_file.py": "catches what torch raises, and unpickles nothing"}
EXEC = {
    "moejax/config/symbols.py": "imports the config file that the user names",
    "moejax/config/annotations.py": "evaluates annotations of code that is already imported",
}


def sources():
    return sorted((ROOT / "moejax").rglob("*.py"))


def offences(text):
    """{kind of offence: [line]} of a Python source."""
    found = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            if {name.partition(".")[0] for name in names} & SERIALISERS:
                found.setdefault("pickle", []).append(node.lineno)
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given = {word.arg: ast.unparse(word.value) for word in node.keywords}
        if called in ("eval", "exec"):
            found.setdefault("exec", []).append(node.lineno)
        if called in ("np.load", "numpy.load") and given.get("allow_pickle") != "False":
            found.setdefault("numpy", []).append(node.lineno)
        if called == "torch.load" and given.get("weights_only") != "True":
            found.setdefault("torch", []).append(node.lineno)
        if called.startswith("pickle.") or called in ("yaml.load", "yaml.unsafe_load"):
            found.setdefault("pickle call", []).append(node.lineno)
    return found


def test_no_file_of_the_package_unpickles_or_executes():
    allowed = {**dict.fromkeys(PICKLE, {"pickle"}), **dict.fromkeys(EXEC, {"exec"})}
    found = {p.relative_to(ROOT).as_posix(): offences(p.read_text()) for p in sources()}
    assert {name: set(kinds) for name, kinds in found.items() if kinds} == allowed


@pytest.mark.parametrize(
    "text, kind",
    [
        ("from dill import loads", "pickle"),
        ("import os, pickle", "pickle"),
        ("import numpy as np\nnp.load(path)", "numpy"),
        ("def f():\n    torch.load(path, weights_only=False)", "torch"),
        ("exec(compile(text, name, 'exec'))", "exec"),
        ("pickle.loads(x)", "pickle call"),
    ],
)
def test_an_offence_would_be_noticed(text, kind):
    assert list(offences(text)) == [kind]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEJAX_CACHE", str(folder / "cache"))
        words = ["train", "configs/tiny.py:smoke", *SMALL, f"workdir={folder / 'run'}"]
        assert main([*words, "mesh.data=1"]) == 0
    return folder


class _Attack:
    """Makes a file when it is unpickled."""

    def __init__(self, marker):
        self._marker = marker

    def __reduce__(self):
        return pathlib.Path.touch, (self._marker,)


# Loads the run in a process in which Python reports what pickles look up and what is started.
LOAD = """
import sys
events = []
watched = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen")
sys.addaudithook(lambda event, given: event in watched and events.append((event, given)))
from moejax.commands import main
import fractions, pickle
pickle.loads(pickle.dumps(fractions.Fraction(1)))
assert [event for event, _ in events] == ["pickle.find_class"], events  # the hook hears it
events.clear()
status = main(sys.argv[1:])
# TensorBoard's writer hands events, and an object as the last, from thread to thread in memory.
own = [("tensorboardX.proto.event_pb2", "Event"), ("builtins", "object")]
events = [(event, given) for event, given in events if tuple(given) not in own]
print("heard:", [(e, str(g)) for e, g in events if "lscpu" not in str(g) and "uname" not in str(g)])
sys.exit(status)
"""


def load(folder, *words):
    return subprocess.run(
        [sys.executable, "-c", LOAD, *words],
        cwd=ROOT,
        env=os.environ
        | {
            "MOEJAX_CACHE": str(folder / "cache"),
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "1",
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
def test_evaluating_and_resuming_a_run_unpickles_and_starts_nothing(finished):
    for words in (["evaluate", finished / "run"], ["train", finished / "run"]):
        done = load(finished, *map(str, words))
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "heard: []"


@pytest.mark.slow
@pytest.mark.parametrize("which", ["config.json", "checkpoints", "tokenizer"])
def test_pickles_in_place_of_a_runs_files_are_refused_and_not_run(
    finished, tmp_path, monkeypatch, capsys, which
):
    monkeypatch.setenv("MOEJAX_CACHE", str(finished / "cache"))
    run, marker = tmp_path / "run", tmp_path / "executed"
    shutil.copytree(finished / "run", run)
    attack = pickle.dumps(_Attack(marker))
    place = run / which
    files = [place] if place.is_file() else [p for p in place.rglob("*") if p.is_file()]
    assert files
    for file in files:
        file.write_bytes(attack)
    assert main(["evaluate", str(run)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert not marker.exists()
    pickle.loads(attack)
    assert marker.exists()  # it would have


@pytest.mark.slow
def test_a_config_that_names_a_shell_is_refused_and_not_run(finished, tmp_path, capsys):
    run, marker = tmp_path / "run", tmp_path / "executed"
    shutil.copytree(finished / "run", run)
    config = json.loads((run / "config.json").read_text())
    command = {"__call__": "os:system", "args": {"0": f"touch {marker}"}}
    config["config"]["args"]["workdir"] = command
    (run / "config.json").write_text(json.dumps(config))
    assert main(["train", str(run)]) == 2
    assert "'os:system', which is not loaded" in capsys.readouterr().err
    assert not marker.exists()


@pytest.mark.slow
def test_the_checkpoints_of_another_model_are_refused_by_the_first_leaf(
    finished, tmp_path, monkeypatch, capsys
):
    """A folder whose checkpoints were exchanged for those of a model of another width."""
    monkeypatch.setenv("MOEJAX_CACHE", str(finished / "cache"))
    run, words = tmp_path / "run", ["train", "configs/tiny.py:smoke", *SMALL, "model.d_model=32"]
    (run / "checkpoints").parent.mkdir()
    stored = json.loads((finished / "run" / "config.json").read_text())
    text = json.dumps(stored).replace('"d_model": 16', '"d_model": 32')
    assert text != json.dumps(stored)
    (run / "config.json").write_text(text)
    shutil.copytree(finished / "run" / "checkpoints", run / "checkpoints")
    assert main([*words, "mesh.data=1", f"workdir={run}"]) == 2
    error = capsys.readouterr().err
    assert "step_00000002 belongs to another experiment: " in error
    assert re.search(r"\S+ is float32\[.*16.*\] there and float32\[.*32.*\] in this", error)
    assert len(error.splitlines()[-1]) < 500


def test_a_bucket_is_refused_at_once_and_no_folder_of_that_name_appears(tmp_path, capsys):
    place = "gs://a-bucket-that-nobody-has/run"
    assert main(["train", "configs/tiny.py:smoke", f"workdir={place}"]) == 2
    error = capsys.readouterr().err
    assert f"workdir={place} is the address of a bucket" in error
    assert "mount the bucket" in error
    assert not pathlib.Path("gs:").exists()
