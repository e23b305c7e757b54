"""README and docs stay true: methods listed, linked files there, commands that exist."""

import pathlib
import re
import subprocess
import sys

import pytest

from moejax.commands import find_commands

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_table_of_methods_is_current():
    tool = ROOT / "tools" / "update_methods.py"
    assert subprocess.run([sys.executable, tool, "--check"], check=False).returncode == 0


@pytest.mark.parametrize("document", sorted(p.name for p in ROOT.glob("*.md")))
def test_every_file_that_a_document_names_is_there(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    named = set(re.findall(r"\]\(([^)#:]+)\)", text))
    named |= {
        name
        for name in re.findall(r"`((?:tests|moejax|configs|tools|docs|launch)/[\w./]+)`", text)
        if "my_" not in name
    }
    assert named
    missing = [name for name in sorted(named) if not (ROOT / name).exists()]
    assert not missing


def test_every_command_is_in_the_readme():
    for command in find_commands():
        assert f"`moejax {command} " in README
