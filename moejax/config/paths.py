"""The tree of a config: its parameters, its paths, and what lies at them.

A path is the names of parameters, list or tuple positions and dictionary keys joined by dots:
`model.block.ffn.router.k`, `data.train.sources.0.weight`. Linen's own fields `parent` and `name`
are no part of the tree.

Nor is a field that a prototype's owner sets in every copy of it, such as the width of a
projection, unless someone has set it, which `check.py` refuses. It is declared so by
`dataclasses.field(metadata={"set_by_owner": True})`.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import difflib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import fiddle as fdl
import flax.linen as nn

from moejax.config import annotations, known, symbols
from moejax.errors import UserError

UNSET = fdl.NO_VALUE  # what a required parameter without a value holds


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One visible parameter of a class or function. `default` is None where a factory makes it."""

    annotation: Any
    required: bool
    default: Any
    factory: Callable[[], Any] | None
    set_by_owner: bool = False


@dataclasses.dataclass(frozen=True)
class Node:
    """What lies at one path. `explicit` is False for a default that nobody has set."""

    path: str
    value: Any
    annotation: Any
    explicit: bool


@functools.cache
def parameters(target: Any) -> dict[str, Parameter]:
    """The visible named parameters of a class or function, in the order of its signature."""
    is_module = isinstance(target, type) and issubclass(target, nn.Module)
    hidden = ("parent", "name") if is_module else ()
    hints = annotations.resolve(target)
    fields = dataclasses.fields(target) if dataclasses.is_dataclass(target) else ()
    factories = {f.name: f.default_factory for f in fields if _has_factory(f)}
    owned = {f.name for f in fields if f.metadata.get("set_by_owner")}
    out = {}
    for name, p in inspect.signature(target).parameters.items():
        if name in hidden or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD, p.POSITIONAL_ONLY):
            continue
        required = p.default is p.empty
        default = None if required or name in factories else p.default
        out[name] = Parameter(
            hints.get(name, Any), required, default, factories.get(name), name in owned
        )
    return out


def _has_factory(field: dataclasses.Field) -> bool:
    return field.default_factory is not dataclasses.MISSING


def default_of(parameter: Parameter) -> Any:
    """A fresh default, with every component in it as a config, or UNSET."""
    if parameter.required:
        return UNSET
    return as_config(parameter.factory() if parameter.factory else parameter.default)


def as_config(value: Any, memo: dict[int, Any] | None = None) -> Any:
    """Turns modules, dataclass instances and JAX initialisers, at any depth, into configs.

    One object at two places becomes one config at two places. Fields that equal their default
    stay unset.
    """
    memo = {} if memo is None else memo
    if id(value) not in memo:
        memo[id(value)] = (_as_config(value, memo), value)  # holds `value`: its id stays taken
    return memo[id(value)][0]


def _as_config(value: Any, memo: dict[int, Any]) -> Any:
    if isinstance(value, fdl.Buildable):
        for name, argument in list(value.__arguments__.items()):
            new = as_config(argument, memo)
            if new is not argument:
                _with_child(value, name, new)
        return value
    if isinstance(value, list):
        value[:] = [as_config(v, memo) for v in value]
        return value
    if isinstance(value, tuple):
        items = [as_config(v, memo) for v in value]
        if all(map(lambda a, b: a is b, items, value)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, collections.abc.Mapping):
        return {k: as_config(v, memo) for k, v in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _instance_config(value, memo)
    initializer = known.initializer_call(value)
    if initializer is not None:
        return fdl.Config(initializer[0], **initializer[1])
    return value


def _instance_config(value: Any, memo: dict[int, Any]) -> fdl.Config:
    arguments = {}
    for name, parameter in parameters(type(value)).items():
        given = as_config(getattr(value, name), memo)
        if not _same(given, default_of(parameter)):
            arguments[name] = given
    return fdl.Config(type(value), **arguments)


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    try:
        return type(a) is type(b) and bool(a == b)
    except Exception:  # arrays and other values without a truth value
        return False


def children(value: Any, annotation: Any) -> list[tuple[Any, Node]]:
    """The (key, node) pairs below one value; a node's path is here only its last component."""
    if isinstance(value, fdl.Buildable):
        return _config_children(value)
    if isinstance(value, (list, tuple)):
        return [
            (i, Node(str(i), v, _element(annotation, value, i), True)) for i, v in enumerate(value)
        ]
    if isinstance(value, dict):
        return [
            (k, Node(str(k), v, _element(annotation, value, k), True)) for k, v in value.items()
        ]
    return []


def _config_children(config: fdl.Buildable) -> list[tuple[Any, Node]]:
    given = dict(config.__arguments__)
    out = []
    for name, parameter in parameters(fdl.get_callable(config)).items():
        explicit = name in given
        value = given.pop(name) if explicit else default_of(parameter)
        if value is UNSET and isinstance(config, fdl.Partial):
            continue
        if parameter.set_by_owner and not explicit:
            continue
        out.append((name, Node(name, value, parameter.annotation, explicit)))
    for key, value in given.items():  # *args by position, **kwargs by name
        if key not in ("parent", "name"):
            out.append((key, Node(str(key), value, Any, True)))
    return out


def _element(annotation: Any, container: Any, key: Any) -> Any:
    for member in annotations.members(annotation):
        origin, args = annotations.typing.get_origin(member), annotations.typing.get_args(member)
        if not isinstance(origin, type) or not isinstance(container, origin) or not args:
            continue
        if origin is tuple:
            return args[0] if args[-1] is Ellipsis else args[key] if key < len(args) else Any
        return args[-1]
    return Any


def walk(config: Any) -> Iterator[Node]:
    """Every node of the tree, defaults included, parents first, in tree order.

    The root comes first and has the empty path. A required parameter without a value has the
    value UNSET.
    """
    yield from _walk(Node("", config, Any, True))


def _walk(node: Node) -> Iterator[Node]:
    yield node
    for _, child in children(node.value, node.annotation):
        path = f"{node.path}.{child.path}" if node.path else child.path
        explicit = node.explicit and child.explicit
        yield from _walk(dataclasses.replace(child, path=path, explicit=explicit))


def update(config: Any, path: str, change: Callable[[Node], Any]) -> Any:
    """Replaces what lies at `path` by `change(node)`; configs and lists are edited in place.

    Raises:
      UserError: there is no such path; the message names the nearest ones.
    """

    def descend(node: Node, rest: list[str]) -> Any:
        if not rest:
            return change(node)
        for key, child in children(node.value, node.annotation):
            # A dictionary's key may itself hold dots.
            used = child.path.split(".")
            if rest[: len(used)] == used:
                here = f"{node.path}.{child.path}" if node.path else child.path
                new = descend(dataclasses.replace(child, path=here), rest[len(used) :])
                return _with_child(node.value, key, new)
        raise UserError(_unknown(config, path, node))

    return descend(Node("", config, Any, True), path.split("."))


def _with_child(value: Any, key: Any, new: Any) -> Any:
    if isinstance(value, fdl.Buildable) and isinstance(key, str):
        setattr(value, key, new)
    elif isinstance(value, tuple):
        items = [new if i == key else v for i, v in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    else:
        value[key] = new
    return value


def is_set_by_owner(prototype: Any, name: str) -> bool:
    """Whether `name` is a field of this config that is set in every copy of what it builds."""
    if not isinstance(prototype, fdl.Buildable):
        return False
    parameter = parameters(fdl.get_callable(prototype)).get(name)
    return parameter is not None and parameter.set_by_owner


def has_no_effect(config: Any, path: str) -> str:
    """The sentence that refuses a value for a field that is set by its prototype's owner."""
    prototype = path.rpartition(".")[0]
    above = [n for n in walk(config) if n.path != prototype and _is_above(n.path, prototype)]
    owners = [symbols.name_of(fdl.get_callable(n.value)) for n in above if _is_config(n.value)]
    return (
        f"{path} has no effect: {owners[-1] if owners else 'whoever uses it'} sets it in every "
        f"copy that it makes of {prototype or 'this'}; leave it out"
    )


def _is_above(path: str, other: str) -> bool:
    return not path or other.startswith(path + ".")


def _is_config(value: Any) -> bool:
    return isinstance(value, fdl.Buildable)


def _unknown(config: Any, path: str, reached: Node) -> str:
    last = path.rpartition(".")[2]
    if path in (last, f"{reached.path}.{last}") and is_set_by_owner(reached.value, last):
        return has_no_effect(config, path)
    text = f"there is no parameter {path!r}"
    if reached.path and (reached.value is None or reached.value is UNSET):
        what = "None" if reached.value is None else "not set"
        return (
            f"{text}: {reached.path} is {what}; give it a component first "
            f"({reached.path}=module.path:Class)"
        )
    if isinstance(reached.value, (list, tuple)) and reached.path:
        text += f" ({reached.path} has {len(reached.value)} elements, counted from 0)"
    near = nearest(path, [n.path for n in walk(config) if n.path])
    return f"{text}; the nearest are: {', '.join(near)}" if near else text


def nearest(path: str, valid: list[str], *, limit: int = 4) -> list[str]:
    """The valid paths that `path` most likely means, best first."""
    last = path.rsplit(".", 1)[-1]
    names = {v.rsplit(".", 1)[-1] for v in valid}
    close_names = [last, *difflib.get_close_matches(last, sorted(names), n=3, cutoff=0.7)]
    ending = [v for v in valid if v.endswith("." + path)]
    same_name = [v for name in close_names for v in valid if v.rsplit(".", 1)[-1] == name]
    same_name.sort(key=lambda v: -difflib.SequenceMatcher(None, path, v).ratio())
    close = difflib.get_close_matches(path, valid, n=limit, cutoff=0.6)
    return list(dict.fromkeys(ending + close[:1] + same_name + close))[:limit]
