"""A plan's facts as a file that is kept beside its config, one a line, so that a diff reads.

A change that makes a step need more memory, call a collective more often, send more bytes or
compute an expert densely changes a line. The budget is an upper bound; all else must be equal.
"""

from __future__ import annotations

import difflib
import pathlib
from collections.abc import Sequence

from moejax.errors import UserError
from moejax.planning.network import largest_first
from moejax.planning.plan import Plan

BUDGET = "memory budget"
_COMPILER = "compiled with"
_ROOM, _LITTLE = 1.02, 100_000  # of a budget over what is needed when it is written: share, bytes
_LEAST = 2**16  # bytes of all calls; collectives below are counters and change with the compiler


def facts(plan: Plan) -> list[str]:
    """The lines of the contract that this plan keeps. Raises UserError where it does not fit."""
    memory = plan.memory
    if plan.work is None or memory.needed is None or not memory.fits:
        raise UserError("a step that does not fit has no contract: see what moejax plan advises")
    mesh = " ".join(f"{axis}={size}" for axis, size in plan.mesh.items())
    versions = ", ".join(f"{name} {version}" for name, version in plan.versions.items())
    lines = [
        f"{_COMPILER}: {versions}",
        f"topology: {plan.topology.name}",
        f"mesh: {mesh}",
        f"tokens per step: {plan.tokens}",
        f"{BUDGET}: {_megabytes(memory.needed * _ROOM + _LITTLE)}",
        *(f"memory, {kind}: {_megabytes(n)}" for kind, n in memory.held.items()),
        f"arrays of every expert on every token: {len(plan.expansions)}",
        f"collectives in loops of open length: {plan.work.open_exchanges}",
    ]
    for exchange, count in largest_first(plan.work.exchanges):
        if exchange.num_bytes * count >= _LEAST:
            axes = "+".join(exchange.axes) or "no axis"
            lines.append(
                f"{exchange.kind} over {axes} ({exchange.size}): {count} x {exchange.num_bytes} B"
            )
    return lines


def differences(stated: Sequence[str], plan: Plan) -> list[str]:
    """How the plan breaks a contract, as lines of a diff; empty where it keeps it.

    Raises UserError where the contract has no budget.
    """
    found, stated = facts(plan), list(stated)
    budgets = [line for line in stated if line.startswith(f"{BUDGET}: ")]
    if len(budgets) != 1:
        raise UserError(f"the contract has {len(budgets)} lines '{BUDGET}: N MB' and needs one")
    needed = plan.memory.needed or 0
    within = needed <= _bytes(budgets[0])
    mine = budgets[0] if within else f"{BUDGET}: {_megabytes(needed)}"
    found = [mine if line.startswith(f"{BUDGET}: ") else line for line in found]
    diff = difflib.unified_diff(stated, found, "contract", "this step", n=0, lineterm="")
    changed = [line for line in diff if not line.startswith(("---", "+++", "@@"))]
    compilers = [line for line in changed if line[1:].startswith(_COMPILER)]
    # Another compiler is a reason for a difference and not one itself.
    return changed if len(changed) > len(compilers) else []


def read(path: pathlib.Path) -> list[str]:
    """The lines of a contract but for comments. Raises UserError where there is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"the contract {str(path)!r} cannot be read ({error.strerror}): write it with "
            "--update-contract"
        ) from error
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def write(path: pathlib.Path, plan: Plan, *, command: str) -> None:
    """Stores the contract that `plan` keeps, with the command that wrote it."""
    lines = facts(plan)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([f"# {command}", *lines]) + "\n", encoding="utf-8")


def _megabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:.3f} MB"


def _bytes(line: str) -> float:
    number = line.partition(": ")[2].removesuffix(" MB")
    try:
        return float(number) * 1e6
    except ValueError as error:
        raise UserError(f"the contract's line {line!r} is not '{BUDGET}: N MB'") from error
