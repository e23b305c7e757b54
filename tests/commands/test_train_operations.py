"""What `moejax train` says and writes about itself: profile, program, time, own work."""

import json

import pytest

from moejax.analysis.goodput import goodput, read_sessions
from moejax.commands import main

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


def train(workdir, *words):
    first = ["train", "configs/tiny.py:smoke", f"workdir={workdir}", "prompts=()", "steps=6"]
    assert main([*first, *words]) == 0


def test_a_run_in_two_sessions_accounts_for_its_time(tmp_path, cache, monkeypatch, capsys):
    monkeypatch.setenv("MOEJAX_CACHE", cache)
    workdir = tmp_path / "run"
    train(workdir, "--until", "2", "--dump-hlo")
    assert "goodput" in capsys.readouterr().out
    assert sorted(p.name for p in (workdir / "hlo").iterdir()) == [
        "train_step.compiled.txt",
        "train_step.lowered.txt",
    ]
    train(workdir, "--profile", "3:2")
    out = capsys.readouterr().out
    assert list(workdir.glob("profile/process-0/plugins/profile/*/*.xplane.pb"))

    one, two = read_sessions(workdir)
    assert (one.start, one.last, one.ended) == (0, 2, "--until 2")
    assert (two.start, two.last, two.ended) == (2, 6, "finished")
    for session in (one, two):
        for phase in ("start", "data", "compile", "first step", "save"):
            assert session.seconds[phase] > 0, phase
    assert two.seconds["restore"] > 0
    assert two.seconds["evaluate"] > 0
    found = goodput([one, two])
    assert found.lost == found.down == 0
    assert found.line() in out

    page = (workdir / "report" / "index.html").read_text()
    assert "Where the time went: goodput" in page
    assert "<dt>Productive</dt>" in page
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    works = [r["values"].get("own_work_ms") for r in lines if r["kind"] == "train"]
    assert works[:2] == [None, None]
    assert any(w and 0 < w[0] < 1e5 for w in works)


def test_a_profile_that_cannot_be_read_starts_nothing(tmp_path, capsys):
    words = ["train", "configs/tiny.py:smoke", f"workdir={tmp_path / 'run'}", "--profile", "x"]
    assert main(words) == 2
    assert "--profile x is not STEP:COUNT" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
