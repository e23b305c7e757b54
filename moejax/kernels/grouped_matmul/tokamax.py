"""Grouped matmul by tokamax, openxla's kernel library: an optional peer of moejax's own kernels.

Not yet run on hardware from here. What tokamax leaves to its caller is done here: rows of no group
are selected to zero in results, where its kernels write nothing, and in the operands of the weight
gradient, where the Hopper kernel multiplies by masks; its kernels are named, because its own choice
may end at a dense expansion; each product is asked for by itself, because its derivative knows no
first row. What no named kernel takes is an error of tokamax, raised as it is.

Releases up to 0.0.14 gave groups without rows the weight gradient of the rows before them, on GPUs
(https://github.com/openxla/tokamax/issues/887), and are refused.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import sys

import jax
import jax.numpy as jnp
from jax import Array, lax

from moejax.kernels import compat
from moejax.kernels.grouped_matmul import ragged_dims
from moejax.kernels.grouped_matmul.groups import LocalGroups
from moejax.kernels.grouped_matmul.held_rows import rolled_to_front, to_front, to_place
from moejax.kernels.tiles import group_bounds

DTYPES = ("float32", "bfloat16")
OLDEST = (0, 0, 17)  # the release whose source this file was written against

# The kernels to ask for, best first: where one refuses a call, tokamax tries the next, and where
# all do it raises. On an H100 its records have Triton at 490 to 725 TFLOP/s in the weight gradient
# and Mosaic at 96 to 119; in the other products Mosaic is mostly ahead.
ROW_KERNELS = {"gpu": ("mosaic_gpu", "triton"), "tpu": ("mosaic_tpu",)}
WEIGHT_KERNELS = {"gpu": ("triton", "mosaic_gpu"), "tpu": ("mosaic_tpu",)}

# What its kernels insist on, found with the real compilers. TPU: whole tiles of rows, which are
# powers of two up to 1024, and no width under 128. GPU (Mosaic): multiples of 64 both ways.
TALLEST_TILE, NARROWEST = 1024, 128
UNIT = 64


def obstacle(dtype) -> str | None:
    """Why this implementation cannot serve operands of `dtype` here, or None."""
    platform, name = compat.target_platform(), jnp.dtype(dtype).name
    if platform not in ROW_KERNELS:
        return (
            f"it has kernels for GPU and TPU; on {platform} it would compute every group for "
            "every row"
        )
    if name not in DTYPES:
        return f"it computes in {' and '.join(DTYPES)}, not in {name}"
    if (missing := _missing_package()) is not None:
        return missing
    if (platform, name) == ("gpu", "float32") and not _has_triton():
        return "on GPU only its Triton kernels compute in float32: pip install jax-triton triton"
    return None


def forward(lhs: Array, rhs: Array, groups: LocalGroups, *, transpose_rhs: bool, dtype) -> Array:
    """out[r] = lhs[r] @ rhs[group of r] (its transpose if `transpose_rhs`); `[R, N]`."""
    dims = ragged_dims.of_rows(transpose_rhs=transpose_rhs)
    # tokamax keeps its tuned tiles by the exact arguments, and plain products without a dtype.
    plain = not transpose_rhs and dtype == jnp.result_type(lhs, rhs)
    out = _ragged_dot(
        # Unselected, which saves a copy: no row of a product depends on another.
        _fit_rows(rolled_to_front(lhs, groups)),
        _fit_widths(rhs),
        _sizes(groups, lhs.shape[0]),
        dims,
        dtype=None if plain else dtype,
        kernels=ROW_KERNELS,
    )
    return to_place(out[: lhs.shape[0], : rhs.shape[1 if transpose_rhs else 2]], groups)


def grad_lhs(dout: Array, rhs: Array, groups: LocalGroups, *, transpose_rhs: bool, dtype) -> Array:
    """dlhs[r] = dout[r] @ rhs[group of r].T; `[R, K]`."""
    return forward(dout, rhs, groups, transpose_rhs=not transpose_rhs, dtype=dtype)


def grad_rhs(lhs: Array, dout: Array, groups: LocalGroups, *, transpose_rhs: bool, dtype) -> Array:
    """drhs[g] = lhs[rows of g].T @ dout[rows of g]; `[G, K, N]` (`[G, N, K]` if transposed)."""
    a, b = (dout, lhs) if transpose_rhs else (lhs, dout)
    drhs = _ragged_dot(
        _fit_rows(to_front(a, groups)),
        _fit_rows(to_front(b, groups)),
        _sizes(groups, lhs.shape[0]),
        ragged_dims.OVER_ROWS,
        dtype=dtype,
        kernels=WEIGHT_KERNELS,
    )
    return drhs[:, : a.shape[1], : b.shape[1]]


def _ragged_dot(a: Array, b: Array, sizes: Array, dims, *, dtype, kernels) -> Array:
    import tokamax  # the library, not this module; it takes seconds

    named = kernels[compat.target_platform()]
    named = tuple(name for name in named if name != "triton" or _has_triton())
    axes = jax.typeof(a).manual_axis_type
    out = tokamax.ragged_dot_general(
        a,
        b,
        # Its tuned tiles are kept by the number of rows too, which only this type tells it.
        tokamax.RaggedDotGroupSizes(sizes, a.shape[0]),
        dims,
        # float32 as everywhere in JAX (`jax_default_matmul_precision`); narrower types have one.
        precision=None if a.dtype == jnp.float32 else lax.Precision.DEFAULT,
        preferred_element_type=dtype,
        manual_axis_type=axes if axes.varying else None,
        implementation=named,
    )
    return compat.vary_alike((out, a))[0]  # its GPU kernels forget that it does


def _sizes(groups: LocalGroups, num_rows: int) -> Array:
    """The groups' sizes, cut where the rows end: tokamax would go on beyond them."""
    starts, ends = group_bounds(groups.sizes, num_rows, groups.first_row)
    return ends - starts


def _fit_rows(rows: Array) -> Array:
    """`[R, W]` with zero rows and columns up to what the kernels take."""
    height, unit = rows.shape[0], UNIT
    if compat.target_platform() == "tpu":
        unit = min(TALLEST_TILE, max(NARROWEST, 1 << (height - 1).bit_length()))
    return _fit_widths(_pad(rows, (-height % unit, 0)))


def _fit_widths(x: Array) -> Array:
    """`[R, W]` or `[G, W, W]` with zero columns up to what the kernels take."""
    on_tpu = compat.target_platform() == "tpu"
    missing = lambda width: max(NARROWEST - width, 0) if on_tpu else -width % UNIT
    return _pad(x, (0, *map(missing, x.shape[1:])))


def _pad(x: Array, by: tuple[int, ...]) -> Array:
    return jnp.pad(x, [(0, more) for more in by]) if any(by) else x


def _missing_package() -> str | None:
    """What has to be installed, or None."""
    if sys.version_info < (3, 12):
        return "tokamax needs Python 3.12 or later and jax 0.11.1 or later"
    if importlib.util.find_spec("tokamax") is None:
        return 'tokamax is not installed: pip install "moejax[tokamax]"'
    version = importlib.metadata.version("tokamax")
    if tuple(map(int, re.findall(r"\d+", version)[:3])) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        return f'tokamax {version} is too old, {oldest} is needed: pip install "moejax[tokamax]"'
    return None


def _has_triton() -> bool:
    """Whether tokamax finds what its Triton kernels need."""
    return all(importlib.util.find_spec(name) is not None for name in ("jax_triton", "triton"))
