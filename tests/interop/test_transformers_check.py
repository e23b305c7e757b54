"""`import-hf --check` beside transformers itself: it agrees, and with a wrong map it does not."""

import numpy as np
import pytest

from moejax.commands import main
from tests.interop.test_logit_check import PLANTED, plant

pytest.importorskip("torch", reason="the extra hf (torch) is not installed")
transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")

from tests.interop.test_hf_transformers import (  # noqa: E402  (it imports torch)
    ARCHITECTURES,
    their_logits,
    theirs,
)


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


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_exported_gives_the_same_logits_there(name, tmp_path):
    theirs(name).save_pretrained(tmp_path / "theirs")
    assert main(["import-hf", str(tmp_path / "theirs"), str(tmp_path / "in")]) == 0
    assert main(["export-hf", str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    np.testing.assert_array_equal(their_logits(model.eval()), their_logits(theirs(name)))


@pytest.mark.parametrize("wrong", PLANTED)
def test_a_wrong_map_does_not(wrong, tmp_path, capsys, monkeypatch):
    theirs("olmoe").save_pretrained(tmp_path / "theirs")
    plant(monkeypatch, wrong)
    status, out = checked(tmp_path / "theirs", tmp_path / "out", capsys)
    assert "DISAGREE" in out
    assert status == 1
    assert not (tmp_path / "out").exists()
