"""`python -m moejax.evaluation` where the harness is not installed."""

import importlib.util

from moejax.evaluation.__main__ import main


def test_the_missing_package_is_named(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main() == 2
    assert "lm_eval is not installed: pip install" in capsys.readouterr().err
