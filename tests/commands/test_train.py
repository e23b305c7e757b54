"""`moejax train` and its siblings, as a user types them."""

import argparse
import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from moejax.commands import arguments, main
from moejax.data.pipeline import Data
from moejax.data.tokenizer import load
from moejax.train.checkpoint import Checkpointer

TINY = "configs/tiny.py:smoke"


CHECKPOINTS = ("checkpoint_every=1", "keep_last=3")


@pytest.fixture(scope="module")
def cache_folder(tmp_path_factory):
    return tmp_path_factory.getbasetemp() / "moejax-cache"


@pytest.fixture
def cache(cache_folder, monkeypatch):
    monkeypatch.setenv("MOEJAX_CACHE", str(cache_folder))
    return cache_folder


@pytest.fixture(scope="module")
def finished_once(tmp_path_factory, cache_folder):
    """(workdir, standard output) of one finished run with a checkpoint after every step."""
    workdir, out = tmp_path_factory.mktemp("finished") / "run", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setenv("MOEJAX_CACHE", str(cache_folder))
        assert main(["train", TINY, f"workdir={workdir}", *CHECKPOINTS]) == 0
    return workdir, out.getvalue()


@pytest.fixture
def finished(finished_once, cache, capsys):
    capsys.readouterr()  # what the run wrote to stderr
    return finished_once


def error_of(capsys, *words):
    assert main(list(words)) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ")
    assert text.count("\n") == 1
    return text


@pytest.mark.slow
def test_train_then_evaluate_sample_and_report(finished, capsys):
    workdir, out = finished
    assert "held-out bits per byte" in out
    for name in ("this model", "gzip -9", "xz -9"):
        assert name in out
    assert f"report: {workdir}" in out
    assert (workdir / "report" / "index.html").exists()
    assert "model.block.ffn.router.k = 2" in (workdir / "config.txt").read_text()

    assert main(["evaluate", str(workdir)]) == 0
    evaluated = capsys.readouterr().out
    figure = lambda text, label: float(
        next(line.split()[-1] for line in text.splitlines() if label in line)
    )
    assert figure(evaluated, "bits_per_byte") == pytest.approx(figure(out, "this model"), abs=6e-4)
    words = ["sample", str(workdir), "--prompt", "def f(", "--prompt", "x", "--seed", "3"]
    assert main([*words, "--max-new-tokens", "8"]) == 0
    once = capsys.readouterr().out
    assert once.startswith("def f(")
    assert main([*words, "--max-new-tokens", "8"]) == 0
    assert capsys.readouterr().out == once

    assert main(["report", str(workdir), "--out", str(workdir / "elsewhere")]) == 0
    assert (workdir / "elsewhere" / "index.html").exists()

    text = error_of(capsys, "evaluate", str(workdir), "--mesh", "data=3")
    assert "cannot be split 3 ways" in text


@pytest.mark.slow
def test_a_run_is_scored_on_text_behind_its_end_token(finished, tmp_path, capsys):
    workdir, _ = finished
    text = tmp_path / "a.txt"
    text.write_text("def f():\n" * 20)

    def figures(*words):
        out = tmp_path / "out.json"
        words = ["--text", text, "--batch-tokens", 64, "--json", out, *words]
        assert main(["evaluate", *map(str, [workdir, *words])]) == 0
        found = json.loads(out.read_text())
        assert found["step"] == 3
        return found["text"][str(text)]

    found, sliding = figures(), figures("--stride", 8, "--mesh", "fsdp=2")
    assert found["tokens"] == sliding["tokens"] == 180
    assert found["bits per byte"] != sliding["bits per byte"]
    assert f"{text}: 180 tokens" in capsys.readouterr().out


@pytest.mark.slow
def test_a_workdir_with_another_experiment_is_refused(finished, capsys):
    workdir, _ = finished
    text = error_of(capsys, "train", TINY, f"workdir={workdir}", "model.block.ffn.router.k=1")
    assert "holds another experiment (model.block.ffn.router.k: 2 -> 1)" in text


@pytest.mark.slow
def test_a_flipped_bit_is_noticed_and_the_checkpoint_before_is_used(finished, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    newest = max((workdir / "checkpoints").glob("*"), key=lambda p: p.name)
    data = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    assert main(["train", TINY, f"workdir={workdir}", *CHECKPOINTS]) == 0
    events = (workdir / "metrics.jsonl").read_text()
    assert '"step": 2' in next(line for line in events.splitlines() if '"resumed"' in line)
    assert "step 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.block.ffn.router.k=9", "router.k=9 must be between 1 and num_experts=4"),
        ("model.block.attention.num_kv_heads=3", "must divide"),
        ("model.max_length=16", "longer than model.max_length=16"),
        ("data.train.path=/nowhere", "/nowhere"),
        ("stepz=5", "steps"),
        ("steps=many", "steps"),
        ("workdir=/proc/nowhere/run", "/proc/nowhere"),
        ("workdir=~/run", "workdir=~/run: no shell has put"),
        ("--until=0", "--until 0: name a step"),
        ("model.max_length=64 sampling.max_new_tokens=64", "no room for prompts in model.max_le"),
    ],
)
def test_bad_input_is_one_clear_sentence(tmp_path, cache, capsys, override, message):
    swap = ["data.train=moejax.data.source:TextFiles"] if "data.train.path" in override else []
    words = ["train", TINY, f"workdir={tmp_path / 'run'}", *swap, *override.split()]
    assert message in error_of(capsys, *words)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.block.ffn.router.k=99", "router.k=99"),
        ("optimizer.schedule.warmup_steps=9", "warmup_steps"),
        ("model.block.attention.soft_cap=0", "soft_cap=0"),
    ],
)
def test_what_needs_no_data_is_refused_before_any_is_read(
    tmp_path, monkeypatch, capsys, override, message
):
    monkeypatch.setenv("MOEJAX_CACHE", str(tmp_path / "cache"))
    read = lambda *_: pytest.fail("the data were read before the model was checked")
    monkeypatch.setattr(Data, "prepare", read)
    words = ["train", TINY, f"workdir={tmp_path / 'run'}"]
    assert message in error_of(capsys, *words, override)
    assert not (tmp_path / "cache" / "documents").exists()
    assert not list((tmp_path / "run").iterdir())  # the right config may still have the folder


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_checkpoints_and_the_printed_command_resumes(tmp_path, cache, number):
    workdir = tmp_path / "run"
    words = [TINY, f"workdir={workdir}", "steps=100000", "log_every=1", "checkpoint_every=0"]
    environment = dict(os.environ, JAX_PLATFORMS="cpu")
    process = subprocess.Popen(
        [sys.executable, "-m", "moejax", "train", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    metrics, deadline = workdir / "metrics.jsonl", time.monotonic() + 180
    while not metrics.exists() or '"train"' not in metrics.read_text():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(number)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    assert number.name in out
    assert f"moejax train {workdir}" in out
    with Checkpointer(str(workdir / "checkpoints")) as checkpointer:
        step = checkpointer.steps()[-1]
    resumed = subprocess.run(
        [sys.executable, "-m", "moejax", "train", str(workdir), "--until", str(step + 1)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert resumed.returncode == 0, resumed.stderr
    assert f"stopped at step {step + 1}" in resumed.stdout


def test_tokenize_writes_the_tokenizer_that_training_uses(tmp_path, cache, capsys):
    assert main(["tokenize", TINY, "--out", str(tmp_path / "tokenizer")]) == 0
    out = capsys.readouterr().out
    assert "held-out bytes" in out
    assert load(tmp_path / "tokenizer").vocab_size == 264
    assert "264" in out


def test_help_shows_a_working_example(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    example = out[out.index("example:") :].split()
    assert example[1:4] == ["moejax", "train", "configs/tiny.py"]
    arguments.config_from(
        argparse.Namespace(config=example[3], overrides=example[4:], trust_config=False)
    )
