"""Names for the leaves of a pytree, and patterns over those names.

A leaf's path is its keys joined by '/': `block/ffn/router/kernel`. A pattern matches whole paths: a
glob as `fnmatch` has them, whose `*` also crosses '/', or a regular expression after `re:`.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax

from moejax.errors import UserError
from moejax.types import named_leaves

_REGEX = "re:"


def map_named(function, tree: Any) -> Any:
    """Applies `function(path, leaf)` to every leaf and keeps the structure."""
    leaves = [function(path, leaf) for path, leaf in named_leaves(tree).items()]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def matches(path: str, patterns: Iterable[str]) -> bool:
    """True where one of the patterns matches the whole path; case counts.

    Raises UserError for a regular expression that is none.
    """
    return any(_matches(path, pattern) for pattern in patterns)


def _matches(path: str, pattern: str) -> bool:
    if not pattern.startswith(_REGEX):
        return fnmatch.fnmatchcase(path, pattern)
    try:
        return re.fullmatch(pattern.removeprefix(_REGEX), path) is not None
    except re.error as error:
        raise UserError(f"{pattern!r} is no regular expression: {error}") from error


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
        "patterns are globs (or re:...) over whole paths, such as "
        f"{', '.join(near) or '(no parameters)'}"
    )
