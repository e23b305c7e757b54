"""The definition of grouped matmul: a loop over groups, in numpy float64."""

from __future__ import annotations

import numpy as np


def grouped_matmul(lhs, rhs, group_sizes, *, group_offset=0, transpose_rhs=False) -> np.ndarray:
    """out[r] = lhs[r] @ rhs[g] for the rows r of each group g that `rhs` holds, else 0."""
    lhs, rhs = np.asarray(lhs, np.float64), np.asarray(rhs, np.float64)
    rhs = rhs.swapaxes(1, 2) if transpose_rhs else rhs
    out = np.zeros((lhs.shape[0], rhs.shape[2]))
    for group, rows in group_rows(group_sizes, group_offset, rhs.shape[0]):
        out[rows] = lhs[rows] @ rhs[group]
    return out


def gradients(lhs, rhs, group_sizes, dout, *, group_offset=0, transpose_rhs=False):
    """(dlhs, drhs) for the cotangent `dout` `[R, N]`, in the shapes of `lhs` and `rhs`."""
    lhs, rhs, dout = (np.asarray(a, np.float64) for a in (lhs, rhs, dout))
    rhs = rhs.swapaxes(1, 2) if transpose_rhs else rhs
    dlhs, drhs = np.zeros(lhs.shape), np.zeros(rhs.shape)
    for group, rows in group_rows(group_sizes, group_offset, rhs.shape[0]):
        dlhs[rows] = dout[rows] @ rhs[group].T
        drhs[group] = lhs[rows].T @ dout[rows]
    return dlhs, drhs.swapaxes(1, 2) if transpose_rhs else drhs


def group_rows(group_sizes, group_offset, num_groups):
    """(index into `rhs`, slice of rows) of each group that `rhs` holds."""
    ends = np.cumsum(np.asarray(group_sizes))
    for group in range(len(ends)):
        if group_offset <= group < group_offset + num_groups:
            start = ends[group - 1] if group else 0
            yield group - group_offset, slice(int(start), int(ends[group]))
