"""The `moejax` command: its subcommands, its help and its errors."""

import argparse
import pathlib
import shlex
import subprocess
import sys
import textwrap
import types

import pytest

from moejax import commands
from moejax.commands import arguments
from moejax.config.load import load_config
from moejax.config.serialize import dump_config
from moejax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[2]

CONFIG = """
from fiddle.experimental.auto_config import auto_config
import dataclasses

@dataclasses.dataclass(frozen=True)
class Run:
    steps: int
    workdir: str = "runs/x"

@auto_config
def config():
    return Run(steps=10)
"""


@pytest.fixture
def toy(monkeypatch):
    """A command `toy-run` that exists only here; the list of what it was called with."""
    calls = []

    def run(args):
        calls.append(arguments.config_from(args))
        if calls[-1].steps == 0:
            raise UserError("steps=0 must be at least 1")
        if calls[-1].steps == 13:
            raise ZeroDivisionError("a bug")

    module = types.ModuleType("moejax.commands.toy_run", "Does a toy run.\n\nAt length.")
    module.EXAMPLE = "moejax toy-run configs/tiny.py steps=50 workdir=runs/a"
    module.add_arguments = arguments.add_config_arguments
    module.run = run
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(commands, "find_commands", lambda: {"toy-run": "Does a toy run."})
    return calls


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run_toy.py"
    path.write_text(CONFIG)
    return str(path)


def test_overrides_reach_the_config(toy, config):
    assert commands.main(["toy-run", config, "steps=50", "workdir=runs/a"]) == 0
    assert (toy[0].steps, toy[0].workdir) == (50, "runs/a")


def test_a_moved_run_is_its_own_workdir(toy, config, tmp_path):
    moved = tmp_path / "moved"
    moved.mkdir()
    stored = dump_config(load_config(config), {})
    (moved / "config.json").write_text(stored)
    assert commands.main(["toy-run", str(moved)]) == 0
    assert toy[0].workdir == str(moved)
    assert commands.main(["toy-run", str(moved), "workdir=elsewhere"]) == 0
    assert toy[1].workdir == "elsewhere"


def test_options_may_stand_among_the_overrides(toy, config):
    assert commands.main(["toy_run", config, "steps=5", "--trust-config", "workdir=b"]) == 0
    assert (toy[0].steps, toy[0].workdir) == (5, "b")


@pytest.mark.parametrize(
    "words, message",
    [
        (["steps=0"], "error: steps=0 must be at least 1\n"),
        (["step=5"], "error: there is no parameter 'step'; the nearest are: steps\n"),
        (["steps=x"], "error: steps takes int, not 'x' (str)\n"),
        (
            ["--steps=5"],
            "error: unknown argument '--steps=5'; overrides are written without dashes: steps=5; "
            "moejax toy-run --help shows an example\n",
        ),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(toy, config, words, message, capsys):
    assert commands.main(["toy-run", config, *words]) == 2
    assert capsys.readouterr().err == message


def test_debug_shows_the_traceback(toy, config):
    for words in (
        ["--debug", "toy-run", config, "steps=0"],
        ["toy-run", config, "steps=0", "--debug"],
    ):
        with pytest.raises(UserError):
            commands.main(words)


def test_a_bug_keeps_its_traceback(toy, config):
    with pytest.raises(ZeroDivisionError):
        commands.main(["toy-run", config, "steps=13"])


def test_a_missing_config_is_named(toy, capsys):
    assert commands.main(["toy-run"]) == 2
    assert "CONFIG[:function]" in capsys.readouterr().err
    assert commands.main(["toy-run", "steps=5"]) == 2
    assert "the config comes before its overrides: CONFIG steps=5" in capsys.readouterr().err


def test_help_of_a_command_shows_an_example(toy, capsys):
    with pytest.raises(SystemExit) as caught:
        commands.main(["toy-run", "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "usage: moejax toy-run" in out
    assert "Does a toy run.\n\nAt length." in out
    assert "example:\n  moejax toy-run configs/tiny.py steps=50 workdir=runs/a" in out
    assert "--trust-config" in out


def test_help_lists_the_commands(toy, capsys):
    assert commands.main(["--help"]) == 0
    assert "  toy-run  Does a toy run." in capsys.readouterr().out
    assert commands.main([]) == 2


@pytest.mark.parametrize("word", ["toy-rum", "toyrun"])
def test_an_unknown_command_suggests_the_nearest(toy, word, capsys):
    assert commands.main([word]) == 2
    assert capsys.readouterr().err == (
        f"error: there is no command {word!r}; did you mean 'toy-run'?\n"
    )
    assert commands.main(["zzz"]) == 2
    assert capsys.readouterr().err.endswith("there are toy-run\n")


def test_commands_are_found_without_importing_them(tmp_path):
    (tmp_path / "import_it.py").write_text('"""First line.\n\nMore."""\ndef run(args): ...\n1/0\n')
    (tmp_path / "arguments.py").write_text('"""No command."""\n')
    (tmp_path / "_private.py").write_text('"""Private."""\ndef run(args): ...\n')
    assert commands.find_commands(tmp_path) == {"import-it": "First line."}


def test_every_command_has_help_an_example_and_arguments():
    for name, first_line in commands.find_commands().items():
        module = __import__(f"moejax.commands.{name.replace('-', '_')}", fromlist=["run"])
        assert first_line.endswith("."), name
        assert module.EXAMPLE.startswith(f"moejax {name}"), name
        module.add_arguments(argparse.ArgumentParser())


def test_the_configs_that_examples_name_exist():
    named = {}
    for name in commands.find_commands():
        module = __import__(f"moejax.commands.{name.replace('-', '_')}", fromlist=["EXAMPLE"])
        named |= {word: name for word in shlex.split(module.EXAMPLE) if word.startswith("configs/")}
    assert named
    for word, name in named.items():
        file, _, function = word.partition(":")
        assert (ROOT / file).is_file(), f"moejax {name} --help names {file}"
        text = (ROOT / file).read_text()
        assert f"def {function or 'config'}(" in text, f"moejax {name} --help names {word}"


def test_python_m_moejax_help_imports_neither_jax_nor_fiddle():
    code = textwrap.dedent(
        """
        import runpy, sys
        sys.argv = ["moejax", "--help"]
        try:
            runpy.run_module("moejax", run_name="__main__")
        except SystemExit as exit:
            assert exit.code == 0, exit.code
        loaded = {"jax", "fiddle", "flax", "numpy"} & set(sys.modules)
        assert not loaded, loaded
        """
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: moejax COMMAND")
