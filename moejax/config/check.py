"""Checks a whole config before anything is built."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import fiddle as fdl
import flax.linen as nn

from moejax.config import annotations, paths, symbols
from moejax.config.overrides import wrong_type
from moejax.errors import UserError

QUANTITIES: Mapping[str, Collection[str]] = {
    "steps": ("steps", "num_steps", "total_steps", "max_steps"),
    "sequence length": ("seq_len", "sequence_length", "max_seq_len", "context_length"),
    "batch size": ("batch_size", "global_batch_size"),
    "vocabulary": ("vocab_size", "num_tokens"),
    "model width": ("d_model", "model_dim", "hidden_size"),
    "experts": ("num_experts",),
    "seed": ("seed",),
}


def check_config(config: fdl.Config) -> fdl.Config:
    """Returns `config` if nothing is wrong with it as a tree.

    Raises:
      UserError: names every path at which a required argument is missing, a value is not of the
        annotated type, a field is set that its prototype's owner sets, or something lies that is
        also reachable by another path.
    """
    problems = [*_shared(config), *_values(config)]
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    return config


def check_shared(config: fdl.Config) -> None:
    """Raises UserError if a config or container of `config` is reachable by two paths."""
    problems = list(_shared(config))
    if problems:
        raise UserError("\n".join(problems))


def _values(config: fdl.Config) -> Iterator[str]:
    for node in paths.walk(config):
        value = node.value
        if value is paths.UNSET:
            yield f"{node.path} has no value and {_owner(config, node.path)} needs one: set it"
        elif hasattr(value, "as_buildable"):
            yield f"{node.path} is the config function {value.func.__name__} itself: call it"
        elif node.explicit and not annotations.matches(value, node.annotation):
            yield wrong_type(node.path, node.annotation, value)
        if isinstance(value, fdl.Buildable):
            yield from _module_defaults(node)
            for name in value.__arguments__:
                if paths.is_set_by_owner(value, name):
                    yield paths.has_no_effect(config, f"{node.path}.{name}".lstrip("."))


def _owner(config: fdl.Config, path: str) -> str:
    parent = path.rpartition(".")[0]
    for node in paths.walk(config):
        if node.path == parent and isinstance(node.value, fdl.Buildable):
            return symbols.name_of(fdl.get_callable(node.value))
    return "it"


def _module_defaults(node: paths.Node) -> Iterator[str]:
    """A module as a class-level default is one object for every instance: weights get tied."""
    target = fdl.get_callable(node.value)
    if not inspect.isclass(target):
        return
    for name, parameter in paths.parameters(target).items():
        if isinstance(parameter.default, nn.Module):
            kind = type(parameter.default).__name__
            yield (
                f"{symbols.name_of(target)} has a {kind} object as the default of {name!r}, which "
                "all its instances would share with their weights: use "
                f"dataclasses.field(default_factory={kind})"
            )


def _shared(config: fdl.Config) -> Iterator[str]:
    """Mutable values, configs and modules that lie at more than one path."""
    seen: dict[int, str] = {}
    alive = []  # defaults are made afresh during the walk: their ids must not be used again
    skipped: tuple[str, ...] = ()
    for node in paths.walk(config):
        if not isinstance(node.value, (fdl.Buildable, list, dict)):
            continue
        if skipped and node.path.startswith(skipped):
            continue  # what lies below a shared object is shared with it
        alive.append(node.value)
        first = seen.setdefault(id(node.value), node.path)
        if first != node.path:
            skipped += (node.path + ".",)
            yield (
                f"{first} and {node.path} are one and the same object, so that they would share "
                f"their {_what(node.value)}: give each its own (copy.deepcopy of the config)"
            )


def _what(value: Any) -> str:
    return "contents" if isinstance(value, (list, dict)) else "weights and settings"


def duplicate_quantities(
    config: fdl.Config, quantities: Mapping[str, Collection[str]] = QUANTITIES
) -> dict[str, list[str]]:
    """The quantities that more than one path owns, with those paths.

    A quantity is owned by a parameter that bears one of its names and holds a number; None
    means that the parameter receives it when the model is built. fiddle copies values, so a
    quantity with two owners can be changed at one of them only, in silence.

    Args:
      config: the config to look through, defaults included.
      quantities: parameter names per quantity.
    """
    owners: dict[str, list[str]] = {name: [] for name in quantities}
    for node in paths.walk(config):
        last = node.path.rpartition(".")[2]
        if not isinstance(node.value, (int, float)) or isinstance(node.value, bool):
            continue
        for name, spellings in quantities.items():
            if last in spellings:
                owners[name].append(node.path)
    return {name: found for name, found in owners.items() if len(found) > 1}
