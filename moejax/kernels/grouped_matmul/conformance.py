"""The conformance kit: what every implementation of grouped matmul must get right.

Each case runs forward, grad_lhs and grad_rhs, and the fused GLU where there is one, against the
definition in float64. Errors are relative and per group, because one wrong small group vanishes in
a norm over all of them; rows that belong to nobody hold NaN in every input.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moejax.kernels.activations import glu_activation
from moejax.kernels.grouped_matmul import reference
from moejax.kernels.grouped_matmul.groups import local_groups

# Relative Frobenius error allowed in one group: about 2.5 times that of rounding the exact result
# once. For float32 accumulation is most of it.
TOLERANCE = {"float32": 2e-6, "bfloat16": 3e-3, "float16": 4e-4}


@dataclasses.dataclass(frozen=True)
class Shape:
    """Static sizes: each costs an implementation one compilation."""

    rows: int
    inner: int
    outer: int
    held: int  # groups in rhs


@dataclasses.dataclass(frozen=True)
class Case:
    """Group sizes, which are values, at one shape.

    `offset` is None if rhs holds all groups, else the first group that it holds.
    """

    name: str
    sizes: tuple[int, ...]
    shape: Shape
    offset: int | None = None


@dataclasses.dataclass(frozen=True)
class Failure:
    """One product of one case that is not what the definition says."""

    case: str
    product: str
    what: str

    def __str__(self) -> str:
        return f"{self.product}, {self.case}: {self.what}"


# K and N are multiples of 8 and of no tile; 300 rows cross the edges of tiles of 32, 64, 128, 256.
SMALL = Shape(rows=300, inner=40, outer=72, held=8)
_SLICE = dataclasses.replace(SMALL, held=3)

_SIZES = {
    "balanced": (37, 38, 37, 38, 37, 38, 37, 38),
    "empty at the start": (0, 0, 50, 50, 50, 50, 50, 50),
    "empty in the middle": (70, 30, 0, 0, 0, 80, 60, 60),
    "empty at the end": (75, 75, 75, 74, 0, 0, 0, 0),
    "one takes all": (0, 0, 0, 300, 0, 0, 0, 0),
    "all of size one": (1,) * 8,
    "no rows": (0,) * 8,
    "rows left over": (20, 0, 60, 1, 33, 31, 64, 5),
    "one off a tile edge": (31, 33, 63, 65, 1, 95, 0, 0),
    "seven off a tile edge": (25, 39, 57, 71, 7, 89, 0, 0),
    "eight off a tile edge": (24, 40, 56, 72, 8, 88, 0, 0),
    "127 rows": (127, 1, 128, 0, 0, 0, 44, 0),
    "129 rows": (129, 0, 0, 0, 0, 127, 0, 44),
    "one more than a tall tile": (257, 0, 1, 0, 0, 0, 42, 0),
}
CASES = [Case(name, sizes, SMALL) for name, sizes in _SIZES.items()]
OFFSET_CASES = [
    Case(f"{name}, groups from {offset} on", _SIZES[name], _SLICE, offset)
    for name in ("balanced", "rows left over", "empty in the middle")
    for offset in (0, 2, 5, 7)  # from 7 on, two of the three are beyond the last group
]
# A few compilations each.
SHAPE_CASES = [
    Case("one row", (0, 1), Shape(1, 40, 72, 2)),
    Case("33 rows", (16, 17), Shape(33, 40, 72, 2)),
    Case("more groups than rows", (0, 1, 0) * 16 + (0,) * 16, Shape(20, 40, 72, 64)),
    Case("several tall tiles", (1300, 0, 1, 700, 50), Shape(2100, 40, 72, 5)),
    Case("odd widths", (20, 0, 37), Shape(61, 13, 27, 3)),
    Case("widths of one", (20, 0, 37), Shape(61, 1, 1, 3)),
]
# The width of gpt-oss, 22.5 tiles of 128, and a group of many tiles.
WIDE_CASES = [
    Case("width 2880", (257, 0, 129), Shape(420, 2880, 2880, 3)),
    Case("one long group", (0, 8000, 0), Shape(8192, 64, 192, 3)),
]


def failures(
    kernels: Any, case: Case, *, dtype: str = "float32", transpose_rhs: bool = False
) -> list[Failure]:
    """What `kernels` gets wrong in `case`; empty if nothing.

    Args:
      kernels: has `forward`, `grad_lhs`, `grad_rhs` (see `tile_scan.py`); hashable.
      case: one of this module's lists, or your own.
      dtype: of the operands, a key of `TOLERANCE`.
      transpose_rhs: rhs is `[G, N, K]`.
    """
    lhs, rhs, dout = _operands(case.shape, dtype, transpose_rhs)
    held = case.shape.held
    parts = list(reference.group_rows(case.sizes, case.offset or 0, held))
    used = _used(parts, case.shape.rows)
    run = _compiled(kernels, transpose_rhs, case.offset is not None)
    sizes, offset = jnp.asarray(case.sizes, jnp.int32), jnp.int32(case.offset or 0)
    with jax.default_matmul_precision("highest"):  # float32 is float32 on every device
        got = run(_poison(lhs, used), rhs, sizes, offset, _poison(dout, used))
    options = {"group_offset": case.offset or 0, "transpose_rhs": transpose_rhs}
    dlhs, drhs = reference.gradients(lhs, rhs, case.sizes, dout, **options)
    want = {
        "forward": (reference.grouped_matmul(lhs, rhs, case.sizes, **options), parts),
        "grad_lhs": (dlhs, parts),
        "grad_rhs": (drhs, [(group, group) for group in range(held)]),
    }
    found: list[Failure] = []
    for (product, (expected, by_group)), value in zip(want.items(), got, strict=True):
        report = functools.partial(Failure, case.name, product)
        if value.dtype != jnp.dtype(dtype):
            found.append(report(f"dtype {value.dtype} instead of {dtype}"))
        found += map(report, _wrong_groups(value, expected, by_group, TOLERANCE[dtype]))
        if product != "grad_rhs" and np.asarray(value, np.float32)[~used].any():
            found.append(report("rows of no group are not zero"))
    return found


def differences_between_runs(kernels: Any, case: Case, *, dtype: str) -> list[Failure]:
    """Products that are not bit for bit the same in a second run."""
    lhs, rhs, dout = _operands(case.shape, dtype, False)
    run = _compiled(kernels, False, False)
    args = (lhs, rhs, jnp.asarray(case.sizes, jnp.int32), jnp.int32(0), dout)
    first, second = (jax.tree.map(np.asarray, run(*args)) for _ in range(2))
    return [
        Failure(case.name, product, "two runs differ")
        for product, a, b in zip(("forward", "grad_lhs", "grad_rhs"), first, second, strict=True)
        if a.tobytes() != b.tobytes()
    ]


def glu_failures(
    kernels_glu: Any, case: Case, *, dtype: str, activation: str, biased: bool
) -> list[Failure]:
    """What a fused or composed GLU gets wrong; `kernels_glu` as `implementations.glu`, bound."""
    rows, gate, _ = _operands(case.shape, dtype, False)
    up = gate[::-1] * jnp.asarray(0.5, dtype)
    rng = np.random.default_rng(1)
    width = (case.shape.held, case.shape.outer)
    biases = tuple(jnp.asarray(rng.standard_normal(width), dtype) for _ in range(2))
    parts = list(reference.group_rows(case.sizes, case.offset or 0, case.shape.held))
    used = _used(parts, case.shape.rows)
    run = _compiled_glu(kernels_glu, activation, biased, case.offset is not None)
    sizes, offset = jnp.asarray(case.sizes, jnp.int32), jnp.int32(case.offset or 0)
    with jax.default_matmul_precision("highest"):
        got = run(_poison(rows, used), gate, up, biases if biased else None, sizes, offset)
    want = []
    for weight, bias in zip((gate, up), biases, strict=True):
        pre = reference.grouped_matmul(rows, weight, case.sizes, group_offset=case.offset or 0)
        for group, part in parts if biased else ():
            pre[part] += np.asarray(bias, np.float64)[group]
        want.append(pre)
    # The definition of h: of the pre-activations as they were returned.
    act = glu_activation(activation)
    want.append(np.asarray(act(*(jnp.asarray(g, jnp.float32) for g in got[:2])), np.float64))
    found: list[Failure] = []
    for name, value, expected in zip(("gate", "up", "h"), got, want, strict=True):
        report = functools.partial(Failure, case.name, f"glu ({activation}): {name}")
        if value.dtype != jnp.dtype(dtype):
            found.append(report(f"dtype {value.dtype} instead of {dtype}"))
        found += map(report, _wrong_groups(value, expected, parts, TOLERANCE[dtype]))
        if np.asarray(value, np.float32)[~used].any():
            found.append(report("rows of no group are not zero"))
    return found


def _wrong_groups(got: Array, want: np.ndarray, by_group: list, tolerance: float) -> Iterator[str]:
    value = np.asarray(got, np.float64)
    if value.shape != want.shape:
        yield f"shape {value.shape} instead of {want.shape}"
        return
    for group, part in by_group:
        if not want[part].size:
            continue
        scale = np.linalg.norm(want[part])
        error = np.linalg.norm(value[part] - want[part])
        if scale == 0 and error != 0:
            yield f"group {group} is {error:.2g} instead of zero"
        elif not error <= tolerance * scale:  # also where it is NaN
            yield f"relative error {error / scale:.2g} in group {group}"


@functools.cache
def _operands(shape: Shape, dtype: str, transpose_rhs: bool) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(0)
    rhs = (shape.outer, shape.inner) if transpose_rhs else (shape.inner, shape.outer)
    shapes = ((shape.rows, shape.inner), (shape.held, *rhs), (shape.rows, shape.outer))
    lhs, rhs, dout = (jnp.asarray(rng.standard_normal(s, np.float32), dtype) for s in shapes)
    return lhs, rhs, dout


@functools.cache
def _compiled(kernels: Any, transpose_rhs: bool, with_offset: bool):
    """(lhs, rhs, sizes, offset, dout) -> the three products."""

    @jax.jit
    def run(lhs, rhs, sizes, offset, dout):
        groups = local_groups(sizes, offset if with_offset else None, rhs.shape[0])
        options = {"transpose_rhs": transpose_rhs, "dtype": lhs.dtype}
        return (
            kernels.forward(lhs, rhs, groups, **options),
            kernels.grad_lhs(dout, rhs, groups, **options),
            kernels.grad_rhs(lhs, dout, groups, **options),
        )

    return run


@functools.cache
def _compiled_glu(glu: Any, activation: str, biased: bool, with_offset: bool):
    del biased  # part of the key: the biases' structure differs

    @jax.jit
    def run(rows, gate, up, biases, sizes, offset):
        groups = local_groups(sizes, offset if with_offset else None, gate.shape[0])
        return glu(rows, gate, up, biases, groups, act=glu_activation(activation))

    return run


def _used(parts: list, num_rows: int) -> np.ndarray:
    used = np.zeros(num_rows, bool)
    for _, rows in parts:
        used[rows] = True
    return used


def _poison(rows: Array, used: np.ndarray) -> Array:
    return jnp.where(used[:, None], rows, jnp.nan)
