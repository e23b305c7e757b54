"""The table of docs/reliability.md from the results of the rig.

python -m tests.reliability.table FOLDER/results.json ...
"""

import json
import pathlib
import sys

from tests.reliability import victim


def lines(results: list[dict]) -> list[str]:
    """Markdown: for each phase how often a process died before, after or, by accident, near it."""
    table = [
        "| phase | before it | after it | by file event | at a random time |",
        "|---|" + "--:|" * 4,
    ]
    for phase in (victim.STEP, *victim.PHASES):
        sides = [f"before {phase}", f"after {phase}"]
        placed = [sum(r["kind"] == side for r in results) for side in sides]
        near = [r["kind"] for r in results if r["place"] in sides and r["kind"] not in sides]
        events = sum(kind.startswith("file event") for kind in near)
        times = sum(kind == "random time" for kind in near)
        table.append(f"| {phase} | {placed[0]} | {placed[1]} | {events} | {times} |")
    early = [r["kind"] for r in results if r["place"] == "start"]
    events = sum(kind.startswith("file event") for kind in early)
    table.append(f"| before the first of them | | | {events} | {len(early) - events} |")
    return table


def main() -> None:
    """Prints the table of all the given files together, and the sums."""
    results = [
        r for name in sys.argv[1:] for r in json.loads(pathlib.Path(name).read_text())["results"]
    ]
    restarts = sum(bool(r["before"]) for r in results)
    damaged = sum(r["damaged"] for r in results)
    print("\n".join(lines(results)))
    print(
        f"{len(results)} kills, {restarts} of them of restarts with saves, {damaged} after a flip"
    )


if __name__ == "__main__":
    main()
