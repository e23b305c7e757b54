"""What every contract needs: contexts, random variables, dtypes of intermediates, a verdict."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from moejax.types import Context

# Compiles two to three times faster; for results, where speed does not matter.
QUICK = {"xla_backend_optimization_level": 0}

Check = Callable[[Any], None]  # of a case; raises AssertionError where the promise is broken


def require(holds: Any, text: str) -> None:
    """Raises AssertionError with `text` where `holds` is not true; unlike `assert`, always."""
    if not holds:
        raise AssertionError(text)


def quick_jit(function: Callable, **options: Any) -> Callable:
    """`jax.jit` with little optimisation."""
    return jax.jit(function, compiler_options=QUICK, **options)


def make_context(mask: Any, *, segment_ids: Any = None, **changes: Any) -> Context:
    """A context for `mask` `[B, S]`; positions count within each row."""
    mask = jnp.asarray(mask, bool)
    batch, length = mask.shape
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), mask.shape)
    context = Context(
        token_mask=mask,
        segment_ids=mask.astype(jnp.int32) if segment_ids is None else jnp.asarray(segment_ids),
        positions=positions,
        token_ids=positions,
        step=jnp.zeros((), jnp.int32),
    )
    return context.replace(**changes)


def random_tree(shapes: Any, *, seed: int = 0) -> Any:
    """A tree like `shapes`: norm scales near 1, everything else normal over its fan-in's root."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        values = rng.standard_normal(leaf.shape)
        if jax.tree_util.keystr(path).endswith("['scale']"):
            values = 1 + 0.1 * values
        elif leaf.ndim >= 2:
            values = values / np.sqrt(leaf.shape[-2])
        return jnp.asarray(values, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def random_variables(module: nn.Module, *args: Any, seed: int = 0) -> Any:
    """Variables of the module's shapes without running (or compiling) its initialisers."""
    args = jax.tree.map(lambda a: jnp.asarray(a) if isinstance(a, np.ndarray) else a, args)
    init = lambda: nn.meta.unbox(module.init(jax.random.key(0), *args))
    return random_tree(jax.eval_shape(init), seed=seed)


def float_dtypes(function: Callable, *args: Any) -> set[str]:
    """The floating dtypes of every intermediate value of `function(*args)`, nested ones too."""
    found: set[str] = set()

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            for var in [*equation.invars, *equation.outvars]:
                dtype = getattr(var.aval, "dtype", None)
                weak = getattr(var.aval, "weak_type", False)  # a Python number follows its peer
                if dtype is not None and jnp.issubdtype(dtype, jnp.floating) and not weak:
                    found.add(str(dtype))
            for value in equation.params.values():
                for inner in value if isinstance(value, list | tuple) else [value]:
                    inner = getattr(inner, "jaxpr", inner)
                    if hasattr(inner, "eqns"):
                        walk(inner)

    walk(jax.make_jaxpr(function)(*args).jaxpr)
    return found


def to_dtype(tree: Any, dtype: Any) -> Any:
    """The tree with its floating leaves cast."""
    is_float = lambda x: jnp.issubdtype(jnp.result_type(x), jnp.floating)
    return jax.tree.map(lambda x: jnp.asarray(x, dtype) if is_float(x) else x, tree)


def require_finite(tree: Any, *, what: str, not_zero: bool = True) -> None:
    """Every leaf finite and, unless said otherwise, none all zero."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = f"{what}{jax.tree_util.keystr(path)}"
        require(np.isfinite(leaf).all(), f"{name} is not finite")
        require(not not_zero or np.abs(leaf).max() > 0, f"{name} is zero everywhere")
