"""Names for the leaves of a pytree, and globs over those names.

A leaf's path is its keys joined by '/': `block/ffn/router/kernel`. Globs are those of `fnmatch`,
matched against the whole path, and `*` also crosses '/'.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Sequence
from typing import Any

import jax

from moejax.errors import UserError
from moejax.types import named_leaves


def map_named(function, tree: Any) -> Any:
    """Applies `function(path, leaf)` to every leaf and keeps the structure."""
    leaves = [function(path, leaf) for path, leaf in named_leaves(tree).items()]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def matches(path: str, patterns: Iterable[str]) -> bool:
    """True where one of the globs matches the whole path; case counts."""
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def match_all(patterns: Sequence[str], paths: Sequence[str], *, field: str) -> dict[str, int]:
    """How many paths each pattern matches; `field` is the setting named in the error.

    Raises UserError for a pattern that matches nothing.
    """
    counts = {p: sum(matches(path, (p,)) for path in paths) for p in patterns}
    for pattern, count in counts.items():
        if count == 0:
            raise UserError(_nothing_matched(pattern, paths, field))
    return counts


def _nothing_matched(pattern: str, paths: Sequence[str], field: str) -> str:
    near = difflib.get_close_matches(pattern, paths, n=3, cutoff=0.0)
    return (
        f"{field}: the pattern {pattern!r} matches none of the {len(paths)} parameters; "
        f"patterns are globs over whole paths, such as {', '.join(near) or '(no parameters)'}"
    )
