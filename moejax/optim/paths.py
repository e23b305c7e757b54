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


def named_leaves(tree: Any) -> dict[str, Any]:
    """{path: leaf} in the order in which jax flattens `tree`.

    Raises ValueError where two leaves would get one path (a key that itself holds a '/').
    """
    out: dict[str, Any] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        if path in out:
            raise ValueError(f"two leaves have the path {path!r}; rename a key that holds a '/'")
        out[path] = leaf
    return out


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
