"""Where two models differ in the function that they compute of given weights."""

from __future__ import annotations

import dataclasses
from typing import Any

from moejax.balance.rule import Rule

# Speed, memory, layout, initialisation and training: none changes what given weights compute. What
# an adapter adds is not among them: whoever saves merges it, or is refused.
_FREE = {
    "adapter",
    "balance_weight",
    "boundaries",
    "context_parallel",
    "down_init",
    "dropout",
    "dtype",
    "embed_init",
    "entropy_weight",
    "gate_init",
    "head_init",
    "implementation",
    "kernel_init",
    "max_length",
    "name",
    "param_dtype",
    "parent",
    "remat",
    "transport",
    "unroll",
}


def differences(ours: Any, theirs: Any, path: str = "model") -> list[str]:
    """In words, such as `model.block.norm.epsilon is 1e-05 and not 1e-06`; empty if none.

    Balance rules may differ: what they add to selection is a leaf (see `mapping.leaves`), and
    the rest of them is training.
    """
    if isinstance(ours, tuple) and ours and isinstance(ours[0], Rule):
        return []
    if dataclasses.is_dataclass(ours) and type(ours) is type(theirs):
        names = [field.name for field in dataclasses.fields(ours) if field.name not in _FREE]
        found = [
            differences(getattr(ours, name), getattr(theirs, name), f"{path}.{name}")
            for name in names
        ]
        return [text for texts in found for text in texts]
    if type(ours) is type(theirs) and ours == theirs:
        return []
    return [f"{path} is {_short(ours)} and not {_short(theirs)}"]


def _short(value: Any) -> str:
    return type(value).__name__ if dataclasses.is_dataclass(value) else repr(value)
