"""What the processes of a run compare before they start."""

import jax
import pytest

from moejax.commands import agreement
from moejax.config.load import load_config
from moejax.config.overrides import apply_overrides
from moejax.kernels import accepted
from moejax.train import processes, sameness


@pytest.fixture
def compared(monkeypatch):
    """As in a run of two processes; the lines of every comparison."""
    lines = []
    monkeypatch.setattr(processes, "num_processes", lambda: 2)
    monkeypatch.setattr(sameness, "check_same", lambda what, text: lines.extend(text.splitlines()))
    return lines


ROUTER = '''
"""A router of the user's own."""
import dataclasses
from moejax.routers.topk import TopK

class Mine(TopK):
    """Top-k under another name."""
'''


def test_config_arguments_versions_and_code_are_compared(compared, tmp_path):
    (tmp_path / "mine.py").write_text(ROUTER)
    own = f"model.block.ffn.router={tmp_path / 'mine.py'}:Mine"
    config = apply_overrides(load_config("configs/tiny.py:smoke"), [own, "steps=7"])
    agreement.check_same_run(config, until=5)
    assert "steps = 7" in compared
    assert "the argument until = 5" in compared
    assert f"the version of jax = {jax.__version__}" in compared
    paths = {line.partition(" = ")[0] for line in compared}
    assert {"the file moejax/train/step.py", "the file moejax/errors.py"} <= paths
    assert f"the file {tmp_path / 'mine.py'}" in paths
    assert len(paths) == len(compared)  # each path once, or a difference would be overwritten


def test_accepted_kernels_are_compared(compared, monkeypatch, tmp_path):
    """Or processes would compile different programs, and wait for each other in the wrong place."""
    config = load_config("configs/tiny.py:smoke")
    agreement.check_same_run(config)
    assert "the kernels accepted = none" in compared
    compared.clear()
    monkeypatch.setenv("MOEJAX_KERNELS", str(tmp_path / "kernels.json"))
    accepted.store("cpu", {"grouped_matmul": {"float32": {"forward": "xla"}}}, {})
    agreement.check_same_run(config)
    assert 'the kernels accepted for grouped_matmul in float32 = {"forward": "xla"}' in compared


def test_alone_nothing_is_compared(monkeypatch, tmp_path):
    monkeypatch.setattr(sameness, "check_same", lambda *unused: pytest.fail("compared"))
    agreement.check_same_run(load_config("configs/tiny.py:smoke"), until=None)
    agreement.check_visible(tmp_path / "missing")


def test_a_file_that_only_the_first_sees_is_noticed(compared, monkeypatch, tmp_path):
    monkeypatch.setattr(agreement, "_VISIBLE_SECONDS", 0)
    monkeypatch.setattr(processes, "exchange", lambda mine, decide: "what the first sees")
    agreement.check_visible(tmp_path / "config.json")
    assert compared == [f"{tmp_path / 'config.json'} = not readable (No such file or directory)"]
