"""The shape of the code, enforced: who imports whom, how long files are, what is documented."""

from __future__ import annotations

import ast
import collections
import pathlib
import re
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = sorted((ROOT / "moejax").rglob("*.py"))
SOURCES = [p for top in ("moejax", "configs", "tests", "tools") for p in (ROOT / top).rglob("*.py")]
MAX_LINES = 300

# Each part of moejax may import itself and what is listed. Families never import each other.
GROUND = {"errors", "types"}
CORE = GROUND | {"kernels", "parallel", "layers"}
FAMILIES = {
    "routers",
    "balance",
    "transport",
    "experts",
    "adapters",
    "attention",
    "depth",
}
MODELS = CORE | FAMILIES | {"models"}
BESIDE = {"optim", "data", "analysis"}  # know nothing of models
EXPERIMENT = MODELS | {"objectives", "optim", "data"}
TRAIN = EXPERIMENT | {"experiment", "analysis", "interop", "interventions", "watchdog"}

MAY_IMPORT = {
    "errors": set(),
    "types": set(),
    "watchdog": {"errors"},  # a parent process that must start before anything can hang
    "kernels": GROUND,
    "parallel": GROUND | {"kernels"},
    "layers": GROUND | {"kernels"},
    **dict.fromkeys(FAMILIES, CORE),
    "models": CORE | FAMILIES,
    "objectives": MODELS,
    **dict.fromkeys(BESIDE, GROUND),
    "interop": MODELS,
    "interventions": MODELS,
    "config": {"errors"},  # edits and stores configs of anything, so it may know nothing
    "experiment": EXPERIMENT,
    "train": TRAIN,
    "verification": TRAIN | {"train"},
    "planning": TRAIN | {"train"},
    "evaluation": TRAIN | {"train", "config"},
    "commands": TRAIN | {"train", "verification", "planning", "evaluation", "config"},
    "__main__": {"commands"},
    "__init__": set(),
}


def parsed(path: pathlib.Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def named(path: pathlib.Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: pathlib.Path) -> Iterator[str]:
    """Every module that the file imports anywhere, functions included."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{named(path)}: relative import; write the full name"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part_of(path: pathlib.Path) -> str:
    """The first level below moejax: a package or a single file."""
    return path.relative_to(ROOT / "moejax").parts[0].removesuffix(".py")


def breaches(path: pathlib.Path, part: str) -> list[str]:
    """The imports of the file that its part may not have."""
    tops = {m.split(".")[1] for m in imports(path) if m.startswith("moejax.")}
    return sorted(tops - MAY_IMPORT[part] - {part})


def test_imports_go_one_way():
    parts = {part_of(path) for path in PACKAGE}
    assert not parts - MAY_IMPORT.keys(), "say in MAY_IMPORT what the new part may import"
    found = {named(p): breaches(p, part_of(p)) for p in PACKAGE}
    assert not {path: tops for path, tops in found.items() if tops}


def test_a_breach_would_be_noticed(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from moejax.balance import rule\n    import moejax.errors\n")
    assert breaches(bad, "routers") == ["balance"]
    assert breaches(bad, "models") == []


def test_nothing_imports_what_stands_outside_the_package():
    outside = {"configs", "tests", "tools", "launch"}
    found = {named(p): outside & {m.split(".")[0] for m in imports(p)} for p in PACKAGE}
    assert not {path: tops for path, tops in found.items() if tops}


def test_kernels_know_no_flax():
    paths = [p for p in PACKAGE if part_of(p) == "kernels"]
    assert paths
    assert not [named(p) for p in paths if any(m.split(".")[0] == "flax" for m in imports(p))]


def test_files_are_short():
    lengths = {named(p): p.read_text().count("\n") for p in SOURCES}
    assert not {path: n for path, n in lengths.items() if n > MAX_LINES}, "split them by subject"


def test_files_are_named_after_what_they_do():
    vague = {"utils", "util", "common", "base", "helpers", "misc", "v2"}
    assert not [named(p) for p in SOURCES if p.stem in vague]


def test_no_two_test_files_have_one_name():
    """pytest could not tell them apart, and would run neither."""
    names = collections.Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert not [name for name, count in names.items() if count > 1]


# The interface of a command, explained once in moejax/commands/__init__.py.
COMMAND_FUNCTIONS = {"add_arguments", "run"}


def undocumented(path: pathlib.Path) -> list[str]:
    """Public functions and classes without a docstring, and the file itself."""
    module = parsed(path)
    kinds = ast.FunctionDef | ast.ClassDef
    public = [n for n in module.body if isinstance(n, kinds) and not n.name.startswith("_")]
    if part_of(path) == "commands":
        public = [n for n in public if n.name not in COMMAND_FUNCTIONS]
    silent = [n.name for n in public if not ast.get_docstring(n)]
    if module.body and not ast.get_docstring(module):
        silent.append("the file")
    return silent


def test_every_file_and_every_public_function_and_class_is_documented():
    found = {named(p): undocumented(p) for p in PACKAGE}
    assert not {path: names for path, names in found.items() if names}


def test_losses_are_returned_and_keys_are_passed():
    """`sow` loses counts under scan and remat; `make_rng` makes draws depend on the layout.

    One file may call it, when variables are made.
    """
    called = {
        named(p): {n.attr for n in ast.walk(parsed(p)) if isinstance(n, ast.Attribute)}
        for p in PACKAGE
    }
    assert not [path for path, names in called.items() if "sow" in names]
    random = [path for path, names in called.items() if "make_rng" in names]
    assert random == ["moejax/layers/adapter_leaf.py"]


def test_no_file_names_a_workplace_or_a_registry():
    hosts = "|".join(("pypi" + r"\.org", "pythonhosted" + r"\.org"))
    pattern = re.compile(r"\.\./" + f"shared|/home/[a-z]|/tmp/[a-z]/|{hosts}")
    kinds = (".md", ".toml", ".txt", ".sh", ".yaml", ".html", "")
    texts = [p for p in ROOT.iterdir() if p.is_file() and p.suffix in kinds]
    for top in ("launch", "docs", ".ci"):
        texts += [p for p in (ROOT / top).rglob("*") if p.is_file() and p.suffix in kinds]
    found = [
        f"{named(path)}: {match.group()}"
        for path in [*SOURCES, *texts]
        for match in pattern.finditer(path.read_text(errors="replace"))
    ]
    assert not found
