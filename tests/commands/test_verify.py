"""`moejax verify` as a user runs it."""

import os
import subprocess
import sys

import pytest

from moejax.commands import main

TINY = "configs/tiny.py:smoke"


def verify(*words):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return subprocess.run(
        [sys.executable, "-m", "moejax", "verify", TINY, *words],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
    )


@pytest.mark.slow
def test_a_mesh_and_a_transport_agree_with_one_device_in_both_dtypes():
    done = verify("--devices", "2", "--only", "least_loaded on expert=2")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1].startswith("all ")
    assert lines[-1].endswith("comparisons agree")
    assert any(line.startswith("least_loaded on expert=2") for line in lines)
    assert {line.split("float")[1][:2] for line in lines if "float" in line} == {"64", "32"}


def test_a_name_that_no_variant_has_compares_nothing_and_fails():
    done = verify("--devices", "1", "--only", "no such variant")
    assert done.returncode == 1
    assert "nothing was compared" in done.stdout


BROKEN = """
import dataclasses
from moejax.transport.local import Local


@dataclasses.dataclass(frozen=True)
class Doubles(Local):
    def __call__(self, x, routing, weights, compute, *, axes=None):
        y, counts = super().__call__(x, routing, weights, compute, axes=axes)
        return 2 * y, counts
"""


def test_a_module_of_ones_own_is_checked_against_its_familys_contract(tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text(BROKEN)
    assert main(["verify", "--module", f"{path}:Doubles"]) == 1
    printed = capsys.readouterr().out
    assert "Doubles among transport" in printed
    assert "FAILED: every choice is computed where the token is" in printed
    assert main(["verify", "--module", "moejax.transport.local:Local"]) == 0
    assert "all 2 promises are kept" in capsys.readouterr().out


NEEDS_AN_ARGUMENT = """
from moejax.transport.local import Local


class Chunked(Local):
    def __init__(self, num_chunks):
        self.num_chunks = num_chunks
"""


def test_a_class_that_cannot_be_built_by_its_defaults_needs_an_example(tmp_path, capsys):
    path = tmp_path / "chunked.py"
    path.write_text(NEEDS_AN_ARGUMENT)
    assert main(["verify", "--module", f"{path}:Chunked"]) == 2
    printed = capsys.readouterr().err
    assert "chunked.py:Chunked cannot be built by its defaults" in printed
    assert "'num_chunks'" in printed
    assert "example()" in printed
    path.write_text(NEEDS_AN_ARGUMENT + "\n\ndef example():\n    return Chunked(2)\n")
    assert main(["verify", "--module", f"{path}:Chunked"]) == 0
    assert "all 2 promises are kept" in capsys.readouterr().out


def test_a_config_or_a_module_is_needed(capsys):
    assert main(["verify"]) == 2
    assert "give a CONFIG or --module" in capsys.readouterr().err
