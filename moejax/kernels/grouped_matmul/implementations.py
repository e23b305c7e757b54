"""The implementations of grouped matmul, and which of them computes each product.

An implementation is a module of this package with the functions `obstacle`, `forward`, `grad_lhs`
and `grad_rhs`, and `glu` and `grad_rows_of_glu` where those are fused. Adding one is a file and its
name here.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from moejax.kernels import compat, dispatch
from moejax.kernels.activations import GluActivation
from moejax.kernels.grouped_matmul.groups import LocalGroups
from moejax.types import at_least_f32

IMPLEMENTATIONS = ("tile_scan", "xla", "tpu", "hopper", "tokamax")
DTYPES = ("bfloat16", "float32", "float16")  # for which the conformance kit has tolerances


class Choice(NamedTuple):
    """The implementation of each product.

    Each may be another one: the fastest forward kernel need not have the fastest gradients.
    """

    forward: str
    grad_lhs: str
    grad_rhs: str
    glu: str


def choose(caller: str, named: str | None, dtype: Any) -> Choice:
    """`named` for every product, or what `dispatch.choose` picks; for operands of `dtype`.

    Raises:
      UserError: `named` is unknown or cannot serve.
    """
    chosen = dispatch.choose(
        "grouped_matmul",
        named,
        IMPLEMENTATIONS,
        products=Choice._fields,
        dtype=jnp.dtype(dtype).name,
        obstacle=functools.partial(obstacle, dtype=dtype),
        portable=_portable(),
        acceptable=acceptable(dtype),
        caller=caller,
    )
    return Choice(*chosen)


def _portable() -> dispatch.Portable:
    """What is right here and never dense."""
    if compat.has_ragged_dot():
        return dispatch.Portable("xla", "XLA's ragged dot is a real grouped kernel there")
    return dispatch.Portable(
        "tile_scan", "XLA's ragged dot computes every group for every row there"
    )


def module(name: str) -> ModuleType:
    """The module of an implementation.

    Imported when first used: Pallas adds half a second to the start of every command.
    """
    return importlib.import_module(f"moejax.kernels.grouped_matmul.{name}")


def obstacle(name: str, dtype: Any) -> str | None:
    """Why the implementation cannot serve operands of `dtype` here, or None."""
    return module(name).obstacle(dtype)


def acceptable(dtype: Any) -> tuple[str, ...]:
    """What `moejax verify-kernels --accept` may choose from here, for operands of `dtype`."""
    if jnp.dtype(dtype).name not in DTYPES:
        return ()
    return tuple(name for name in IMPLEMENTATIONS if not is_dense(name))


def is_dense(name: str) -> bool:
    """Whether it computes every group for every row here: right, and never chosen."""
    return name == "xla" and not compat.has_ragged_dot()


def glu(
    name: str,
    rows: Array,
    gate: Array,
    up: Array,
    biases: tuple[Array, Array] | None,
    groups: LocalGroups,
    *,
    act: GluActivation,
) -> tuple[Array, Array, Array]:
    """(rows Wg + bg, rows Wu + bu, act of both), each `[R, F]` in the dtype of `rows`.

    `act` acts, in at least float32, on the pre-activations as they are returned, so that a backward
    pass that recomputes it gets the same. Rows of no group are zero in all three.

    Args:
      name: the implementation; one without a fused kernel does it in two products.
      rows: `[R, D]`.
      gate, up: the groups' matrices, `[G, D, F]`.
      biases: None, or `[G, F]` for gate and up.
      groups: of the rows.
      act: elementwise, with act(0, 0) = 0.
    """
    kernels = module(name)
    if hasattr(kernels, "glu"):
        return kernels.glu(rows, gate, up, biases, groups, act=act)
    acc = at_least_f32(rows.dtype)
    options = {"transpose_rhs": False, "dtype": rows.dtype if biases is None else acc}
    hidden = [kernels.forward(rows, weight, groups, **options) for weight in (gate, up)]
    if biases is not None:  # added before the one rounding
        hidden = [h + groups.of_rows(b, rows.shape[0]) for h, b in zip(hidden, biases, strict=True)]
    returned = [h.astype(rows.dtype) for h in hidden]
    return *returned, act(*(h.astype(acc) for h in returned)).astype(rows.dtype)


def grad_rows_of_glu(
    name: str, dgate: Array, dup: Array, gate: Array, up: Array, groups: LocalGroups
) -> Array:
    """dgate Wg^T + dup Wu^T, `[R, D]` in the dtype of `dgate`; zero in rows of no group.

    Args:
      name: the implementation; one without a fused kernel adds two rounded products.
      dgate, dup: `[R, F]`.
      gate, up: the groups' matrices, `[G, D, F]`.
      groups: of the rows.
    """
    kernels = module(name)
    if hasattr(kernels, "grad_rows_of_glu"):
        return kernels.grad_rows_of_glu(dgate, dup, gate, up, groups, dtype=dgate.dtype)
    options = {"transpose_rhs": False, "dtype": dgate.dtype}
    left = kernels.grad_lhs(dgate, gate, groups, **options)
    return left + kernels.grad_lhs(dup, up, groups, **options)
