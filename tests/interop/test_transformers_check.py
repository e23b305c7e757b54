"""`import-hf --check` beside transformers itself: it agrees, and with a wrong map it does not."""

import pytest

from moejax.commands import main
from tests.interop.test_logit_check import PLANTED, plant

pytest.importorskip("torch", reason="the extra hf (torch) is not installed")
pytest.importorskip("transformers", reason="the extra hf is not installed")

from tests.interop.test_hf_transformers import ARCHITECTURES, theirs  # noqa: E402


def checked(source, out, capsys) -> tuple[int, str]:
    status = main(["import-hf", str(source), str(out), "--check"])
    return status, capsys.readouterr().out


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_agrees(name, tmp_path, capsys):
    theirs(name).save_pretrained(tmp_path / "theirs")
    status, out = checked(tmp_path / "theirs", tmp_path / "out", capsys)
    assert "verdict: the logits agree" in out
    assert status == 0
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("wrong", PLANTED)
def test_a_wrong_map_does_not(wrong, tmp_path, capsys, monkeypatch):
    theirs("olmoe").save_pretrained(tmp_path / "theirs")
    plant(monkeypatch, wrong)
    status, out = checked(tmp_path / "theirs", tmp_path / "out", capsys)
    assert "DISAGREE" in out
    assert status == 1
    assert not (tmp_path / "out").exists()
