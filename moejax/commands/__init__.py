"""The `moejax` command. Each file of this package with a function `run` is one subcommand.

Such a file has a docstring, whose first line is its help; `EXAMPLE`, a command that works;
`add_arguments(parser)`; and `run(args) -> int`, the exit status. Only the chosen one is
imported.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib
import pathlib
import sys
from collections.abc import Sequence

from moejax.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand. Returns its exit status, 2 for a user's mistake."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [w for w in words if w != "--debug"]
    try:
        return _run(words)
    except UserError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(words: list[str]) -> int:
    commands = find_commands()
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help(commands))
        return 0 if words else 2
    name = words[0].replace("_", "-")
    if name not in commands:
        near = difflib.get_close_matches(name, commands, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(commands)}"
        raise UserError(f"there is no command {words[0]!r}; {hint}")
    module = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
    return int(module.run(_parse(name, module, words[1:])) or 0)


def find_commands(folder: pathlib.Path | None = None) -> dict[str, str]:
    """Command name -> first line of its docstring, for every command, without importing any."""
    folder = folder or pathlib.Path(__file__).parent
    commands = {}
    for path in sorted(folder.glob("[a-z]*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "run" for node in tree.body):
            first_line = (ast.get_docstring(tree) or "").partition("\n")[0]
            commands[path.stem.replace("_", "-")] = first_line
    return commands


def _help(commands: dict[str, str]) -> str:
    width = max(map(len, commands), default=0)
    listed = "\n".join(f"  {name:{width}}  {text}" for name, text in commands.items())
    return (
        "usage: moejax COMMAND ... [--debug]\n\n"
        "MoE training in JAX without silent wrongness.\n\n"
        f"commands:\n{listed}\n\n"
        "moejax COMMAND --help shows its arguments and an example.\n"
        "--debug shows the traceback of an error."
    )


class _Parser(argparse.ArgumentParser):
    """Reports mistakes as UserError, so that they look like every other one."""

    def error(self, message: str) -> None:
        raise UserError(f"{message}; {self.prog} --help shows an example")


def _parse(name: str, module, words: list[str]) -> argparse.Namespace:
    parser = _Parser(
        prog=f"moejax {name}",
        description=module.__doc__,
        epilog=f"example:\n  {module.EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    args, unknown = parser.parse_known_intermixed_args(words)
    if unknown:
        hint = f"unknown argument {unknown[0]!r}"
        if "=" in unknown[0]:
            hint += f"; overrides are written without dashes: {unknown[0].lstrip('-')}"
        parser.error(hint)
    return args
