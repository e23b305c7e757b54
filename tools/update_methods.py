"""Writes the README's table of methods from the first docstring line of every method's file.

python tools/update_methods.py            rewrites README.md
python tools/update_methods.py --check    exits with 1 if it would change
"""

from __future__ import annotations

import ast
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
FAMILIES = {
    "routers": "router",
    "balance": "balance",
    "transport": "transport",
    "experts": "experts",
    "adapters": "adapter",
    "attention": "attention",
    "objectives": "objective",
    "interventions": "intervention",
}
SHARED = ("rule.py", "objective.py", "neighbours.py", "sample_routing.py")
BEGIN = "<!-- methods: begin (tools/update_methods.py) -->\n"
END = "<!-- methods: end -->"


def table() -> str:
    """One row per file: family, file, what it does."""
    rows = ["| family | file | what it does |", "|---|---|---|"]
    for family, label in FAMILIES.items():
        for path in sorted((ROOT / "moejax" / family).glob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            classes = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
            if path.name in SHARED or all(name.startswith("_") for name in classes):
                continue  # what methods share
            doc = ast.get_docstring(tree) or ""
            first = doc.split("\n", 1)[0].rstrip(".:")
            rows.append(f"| {label} | `moejax/{family}/{path.name}` | {first} |")
    return "\n".join(rows) + "\n"


def updated(readme: str) -> str:
    """`readme` with a fresh table between the two markers."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + table() + END + after


def main() -> int:
    path = ROOT / "README.md"
    old = path.read_text(encoding="utf-8")
    new = updated(old)
    if "--check" in sys.argv[1:]:
        return int(new != old)
    path.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
