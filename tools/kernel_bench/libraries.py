"""Other people's grouped matmuls in JAX: XLA's, JAX's sample kernels, tokamax's by name."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Protocol

import jax.numpy as jnp
from jax import lax
from kernel_bench.cases import FORWARD, GRAD_LHS, GRAD_RHS, MOVES, Case
from kernel_bench.peers import (
    CannotRun,
    Dense,
    Dot,
    Moejax,
    MoejaxUnfused,
    Moves,
    NotAVariant,
    glu_of_dot,
    installed,
)
from kernel_bench.torch_peer import Torch

from moejax.kernels import compat
from moejax.kernels.grouped_matmul import implementations

_CUDNN = (("xla_gpu_experimental_use_ragged_dot_fusion", True),)
_GPU, _TPU = ("gpu",), ("tpu",)
_SAMPLES = "jax.experimental.pallas.ops"


class Variant(Protocol):
    """One way to compute the products."""

    @property
    def name(self) -> str: ...

    def function(self, case: Case) -> Callable:
        """Of the case's operands and routing; raises `CannotRun` or `NotAVariant`."""


def variants() -> list[Variant]:
    """All of them, installed or not, the ceiling first."""
    tokamax = {"triton": _GPU, "mosaic_gpu": _GPU, "mosaic_tpu": _TPU, "mosaic_tpu_v2": _TPU}
    return [
        Dense(),
        *(Moejax(name) for name in implementations.IMPLEMENTATIONS),
        *(MoejaxUnfused(name) for name in implementations.IMPLEMENTATIONS),
        Moves("moejax gather"),
        Moves("scatter-add", scatter=True),
        Dot("ragged_dot", _ragged_dot),
        Dot("ragged_dot, cuDNN flag", _ragged_dot, _GPU, _CUDNN),
        MosaicSample(),
        Dot("megablox", _megablox, _TPU),
        *(
            Dot(f"tokamax {name}", functools.partial(_tokamax, name), platforms)
            for name, platforms in tokamax.items()
        ),
        Torch(),
    ]


def _ragged_dot(lhs, rhs, sizes, dtype):
    return lax.ragged_dot(lhs, rhs, sizes, preferred_element_type=dtype)


def _tokamax(name, lhs, rhs, sizes, dtype):
    tokamax = installed("tokamax")
    return tokamax.ragged_dot(
        lhs,
        rhs,
        # With the number of rows, and without a dtype, it finds the tiles that were tuned for it.
        tokamax.RaggedDotGroupSizes(sizes, lhs.shape[0]),
        precision=None if lhs.dtype == jnp.float32 else lax.Precision.DEFAULT,
        preferred_element_type=None if dtype == lhs.dtype else dtype,
        implementation=name,
    )


def _megablox(lhs, rhs, sizes, dtype):
    gmm = installed(f"{_SAMPLES}.tpu.megablox.ops").gmm
    tiling = tuple(
        min(block, size)
        for block, size in zip((512, 1024, 1024), (*lhs.shape, rhs.shape[2]), strict=True)
    )
    return gmm(lhs, rhs, sizes, dtype, tiling)


@dataclasses.dataclass(frozen=True)
class MosaicSample:
    """JAX's `ragged_dot_mgpu` and `transposed_ragged_dot_mgpu`, with one configuration each.

    Of the configurations that their own tuning loops try: 128 x 128 x 64 with as many pipeline
    steps as fit. Neither has gradients; the weight gradient comes in the operands' dtype.
    """

    name: str = "JAX mgpu sample"

    def function(self, case: Case) -> Callable:
        if case.product in MOVES:
            raise NotAVariant
        if (here := compat.target_platform()) != "gpu":
            raise CannotRun(f"it runs on gpu, and this is {here}")
        if case.product in FORWARD or case.product in GRAD_LHS:
            return functools.partial(self._rows, transposed=case.product in GRAD_LHS)
        if case.product in GRAD_RHS:
            return self._weights
        if case.product == "glu":
            return glu_of_dot(functools.partial(self._rows, transposed=False))
        raise CannotRun("it has no gradients")

    def blocks(self, case: Case) -> dict[str, int] | None:
        """What it runs with."""
        if case.product in FORWARD + GRAD_LHS:
            return _sample_blocks(case.widths[case.product in FORWARD])
        return _sample_blocks(case.widths[1]) if case.product in GRAD_RHS else None

    def _rows(self, lhs, rhs, sizes, transposed: bool):
        kernel = installed(f"{_SAMPLES}.gpu.ragged_dot_mgpu").ragged_dot
        blocks = _sample_blocks(rhs.shape[1 if transposed else 2])
        return kernel(lhs, rhs, group_sizes=sizes, transpose_rhs=transposed, **blocks)

    def _weights(self, lhs, dout, sizes):
        kernel = installed(f"{_SAMPLES}.gpu.transposed_ragged_dot_mgpu").transposed_ragged_dot
        blocks = _sample_blocks(dout.shape[1]) | {"block_m": 128 if lhs.shape[1] % 128 == 0 else 64}
        return kernel(lhs, dout, group_sizes=sizes.astype(jnp.int32), **blocks)


def _sample_blocks(width: int) -> dict[str, int]:
    """The configuration for a result that is `width` wide."""
    block = 128 if width % 128 == 0 else 64
    return {
        "block_m": 128,
        "block_n": block,
        "block_k": 64,
        "max_concurrent_steps": 4,
        "grid_block_n": next(g for g in (8, 4, 2, 1) if width % (g * block) == 0 or g == 1),
    }
