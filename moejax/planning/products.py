"""FLOPs of the matrix products of a program, which for TPU are all written as convolutions.

A product over a batch becomes a convolution over it whose window is dilated so that every place
meets its own matrix and otherwise gaps, so only the places count where there is something.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import numpy as np

from moejax.planning.hlo import Instruction


def flops_of(instruction: Instruction, lines: Mapping[str, Instruction]) -> float:
    """Of a `dot` or `convolution` of the computation `lines`, 2 per product; 0 of all else."""
    if instruction.opcode not in ("dot", "convolution"):
        return 0
    out = instruction.arrays[0].dims
    left, right = (lines[name].arrays[0].dims for name in instruction.operands[:2])
    if instruction.opcode == "convolution":
        return _of_convolution(instruction.attributes, left, right, out)
    axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
    inner = [left[int(axis)] for axis in axes[1].split(",") if axis] if axes else []
    return 2 * math.prod(out) * math.prod(inner)


def _of_convolution(
    attributes: str, left: tuple[int, ...], right: tuple[int, ...], out: tuple[int, ...]
) -> float:
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    if labels is None:
        raise ValueError(f"a convolution without dim_labels: {attributes[:200]}")
    named = zip(labels.groups(), (left, right, out), strict=True)
    inputs, kernel, result = (dict(zip(names, dims, strict=True)) for names, dims in named)
    places = 1
    for axis in sorted(set(result) - {"b", "f"}, key=int):
        number = lambda name, default, axis=axis: _of_window(attributes, name, int(axis), default)
        low = re.search(r"pad=([\d_x\-]+)", attributes)
        pad = int(low[1].split("x")[int(axis)].split("_")[0]) if low else 0
        places *= _places(
            result[axis],
            inputs[axis],
            kernel[axis],
            stride=number("stride", 1),
            pad=pad,
            gaps=number("lhs_dilate", 1),
            spread=number("rhs_dilate", 1),
        )
    return 2 * result["b"] * result["f"] * kernel["i"] * places


def _of_window(attributes: str, name: str, axis: int, default: int) -> int:
    """One number of `window={size=128 stride=127 ...}`, for axis `axis` of those joined by x."""
    found = re.search(rf"\b{name}=([\dx]+)", attributes)
    return int(found[1].split("x")[axis]) if found else default


def _places(
    out: int, size: int, window: int, *, stride: int, pad: int, gaps: int, spread: int
) -> int:
    """Pairs of a result and a place of the window that meet an element of the input."""
    at = np.arange(out)[:, None] * stride + np.arange(window) * spread - pad
    inside = (at >= 0) & (at <= (size - 1) * gaps) & (at % gaps == 0)
    return int(inside.sum())
