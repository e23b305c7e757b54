"""What a method of each family promises, as checks for moejax's own methods and for anyone's.

`moejax verify --module my_router.py:MyRouter` runs them on a class of the user's; the test suite on
every method of the package.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.balance.rule import Rule
from moejax.errors import UserError
from moejax.layers.linear import Linear
from moejax.types import Routing
from moejax.verification.contracts.cases import make_context

FAMILIES = ("routers", "balance", "transport", "experts", "adapters", "attention")

# The arguments that a method of each family is called with tell it apart.
_CALLED_WITH = {
    ("num_experts", "d_model"): "experts",
    ("x", "routing", "weights", "compute"): "transport",
}


def contract(family: str) -> ModuleType:
    """The family's contract: its `Case`, made of a method, and its `CHECKS` of a case."""
    return importlib.import_module(f"{__name__}.{family}")


def family_of(method: Any) -> str:
    """The family that a method belongs to.

    Raises UserError where it is none: see the docstring of each family's package.
    """
    if isinstance(method, Rule):
        return "balance"
    if isinstance(method, Linear):
        return "adapters"
    if not callable(method):
        raise UserError(f"{type(method).__name__} is of no family: it cannot be called")
    names = tuple(
        name
        for name, parameter in inspect.signature(method.__call__).parameters.items()
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    )
    if names in _CALLED_WITH:
        return _CALLED_WITH[names]
    if names == ("x", "context"):
        return "routers" if _routes(method) else "attention"
    raise UserError(
        f"{type(method).__name__} is of no family: it is called with ({', '.join(names)}), and "
        "routers and attention are called with (x, context), experts with (num_experts, "
        "d_model), transports with (x, routing, weights, compute); balance rules derive from "
        "balance.rule.Rule, adapters from layers.linear.Linear"
    )


def _routes(module: Any) -> bool:
    """Whether tokens `[T, D]` give a `Routing`."""
    x, context = jnp.zeros((2, 16)), make_context(np.ones((1, 2)), num_experts=64)
    try:
        y = jax.eval_shape(lambda: module.init_with_output(jax.random.key(0), x, context)[0])
    except Exception:  # attention wants sequences; a broken router is known by its annotation
        return "Routing" in str(inspect.signature(module.__call__).return_annotation)
    return isinstance(y, tuple) and isinstance(y[0], Routing)


def broken_promises(method: Any) -> Iterator[tuple[str, str | None]]:
    """(promise, how it is broken or None) for each check of the method's family."""
    found = contract(family_of(method))
    case = found.Case(method)
    for check in found.CHECKS:
        try:
            check(case)
        except Exception as error:  # a method may fail in any way, and the others are still checked
            yield _stated(check), f"{type(error).__name__}: {error}".strip()
        else:
            yield _stated(check), None


def _stated(check: Any) -> str:
    return check.__name__.replace("_", " ")
