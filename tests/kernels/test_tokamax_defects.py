"""The conformance kit finds the published defects of tokamax's GPU kernels.

No GPU is needed to see that: the kernels' steps are re-enacted here, and the kit has to name the
product, the case and the groups.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from moejax.kernels.grouped_matmul import conformance as kit
from moejax.kernels.grouped_matmul import held_rows, reference, xla
from moejax.kernels.grouped_matmul.groups import LocalGroups
from moejax.kernels.tiles import group_bounds

PRODUCTS = ("forward", "grad_lhs", "grad_rhs")
CASES = {case.name: case for case in kit.CASES}
LEFT_OVER = CASES["rows left over"]
EVERY_CASE = pytest.mark.parametrize("case", kit.CASES, ids=list(CASES))


def xla_but(**replaced):
    """An implementation with these products, and with those of `xla` for the rest."""
    products = {name: staticmethod(getattr(xla, name)) for name in PRODUCTS}
    return type("Replaced", (), products | {k: staticmethod(v) for k, v in replaced.items()})


def blamed(kernels, case, **options):
    """(product, group) of every failure; the group is None where rows of nobody are to blame."""
    failures = kit.failures(kernels, case, **options)
    groups = [re.search(r"group (\d+)", failure.what) for failure in failures]
    return {(f.product, int(g[1]) if g else None) for f, g in zip(failures, groups, strict=True)}


def empty_groups(case):
    return {group for group, size in enumerate(case.sizes) if size == 0}


# Issue 887: https://github.com/openxla/tokamax/issues/887

STEP = 32  # rows that the kernel multiplies at a time


def grad_rhs_of_issue_887(lhs, dout, groups, *, transpose_rhs, dtype):
    """drhs as the Triton kernel of tokamax up to 0.0.14 computes it.

    A group's steps but the last run in a loop, all rows of them counting. The last is done behind
    the loop, counting its rows before the group's end, and it is always done. Where a group has no
    rows it is number -1: it starts a step before the group and ends where the group does, so that
    every row of it counts. Nothing keeps it from reading in front of the operand.
    """
    a, b = (dout, lhs) if transpose_rhs else (lhs, dout)
    # What happens to lie around an operand in memory is 1 here.
    a, b = (jnp.pad(x, ((STEP, STEP), (0, 0)), constant_values=1) for x in (a, b))

    def step(number, total, start, count):
        read = lambda x: lax.dynamic_slice_in_dim(x, STEP + start + number * STEP, STEP)
        keep = (jnp.arange(STEP) < count)[:, None]
        return total + jnp.where(keep, read(a), 0).T @ jnp.where(keep, read(b), 0)

    def of_group(start, end):
        last = -(-(end - start) // STEP) - 1
        total = jnp.zeros((a.shape[1], b.shape[1]), jnp.float32)
        total = lax.fori_loop(0, last, lambda i, t: step(i, t, start, STEP), total)
        return step(last, total, start, end - (start + last * STEP))

    starts, ends = group_bounds(groups.sizes, lhs.shape[0], groups.first_row)
    return jax.vmap(of_group)(starts, ends).astype(dtype)


ISSUE_887 = xla_but(grad_rhs=grad_rhs_of_issue_887)


@EVERY_CASE
def test_the_kit_finds_issue_887_and_blames_the_groups_without_rows(case):
    assert blamed(ISSUE_887, case) == {("grad_rhs", group) for group in empty_groups(case)}


def test_the_kit_finds_issue_887_in_the_other_orientation_and_in_bfloat16():
    found = blamed(ISSUE_887, LEFT_OVER, dtype="bfloat16", transpose_rhs=True)
    assert found == {("grad_rhs", 1)}


def test_issue_887_is_reenacted_with_the_values_that_its_kernel_gives():
    """0.0.14's own kernel, run in Pallas's interpreter, gave just these products."""
    rng = np.random.default_rng(0)
    lhs, dout = rng.standard_normal((96, 4)), rng.standard_normal((96, 6))
    sizes = np.array([40, 0, 50, 0, 0])
    drhs = grad_rhs_of_issue_887(
        jnp.asarray(lhs, jnp.float32),
        jnp.asarray(dout, jnp.float32),
        LocalGroups(jnp.asarray(sizes), 0),
        transpose_rhs=False,
        dtype=jnp.float32,
    )
    _, right = reference.gradients(lhs, np.zeros((5, 4, 6)), sizes, dout)
    np.testing.assert_allclose(drhs[jnp.array([0, 2])], right[[0, 2]], rtol=1e-4, atol=1e-4)
    for group, start in ((1, 40), (3, 90), (4, 90)):  # the last two are the same, as reported
        before = slice(start - STEP, start)
        np.testing.assert_allclose(drhs[group], lhs[before].T @ dout[before], rtol=1e-4, atol=1e-4)


# Masks by multiplication.

TILE = 128


def grad_rhs_of_the_hopper_kernel(lhs, dout, groups, *, transpose_rhs, dtype):
    """drhs as tokamax 0.0.17 computes it on an H100 with Mosaic.

    Rows are cut on a fixed grid and a group sums the tiles that it touches: one operand times a
    mask of the group's rows, the other as it is. Reading past the end gives zeros.
    """
    a, b = (dout, lhs) if transpose_rhs else (lhs, dout)
    num_rows = lhs.shape[0]
    a, b = (jnp.pad(x, ((0, -num_rows % TILE), (0, 0))) for x in (a, b))

    def of_group(start, end):
        def tile(i, total):
            row = i * TILE + jnp.arange(TILE)
            mask = ((row >= start) & (row < end))[:, None].astype(a.dtype)
            return total + (a[row] * mask).T @ b[row]

        total = jnp.zeros((a.shape[1], b.shape[1]), jnp.float32)
        return lax.fori_loop(start // TILE, -(-end // TILE), tile, total)

    starts, ends = group_bounds(groups.sizes, num_rows, groups.first_row)
    return jax.vmap(of_group)(starts, ends).astype(dtype)


def selected_in_front(lhs, dout, groups, **options):
    lhs, dout = (held_rows.to_front(x, groups) for x in (lhs, dout))
    return grad_rhs_of_the_hopper_kernel(lhs, dout, LocalGroups(groups.sizes, 0), **options)


MASKED = xla_but(grad_rhs=grad_rhs_of_the_hopper_kernel)
CURED = xla_but(grad_rhs=selected_in_front)


def test_the_kit_finds_masks_by_multiplication():
    assert not blamed(MASKED, CASES["empty in the middle"])  # all rows are used
    # From row 214 on nobody's, NaN: the tile from 128 on is also that of groups 5, 6 and 7.
    assert blamed(MASKED, LEFT_OVER) == {("grad_rhs", group) for group in (5, 6, 7)}


@EVERY_CASE
def test_selecting_in_front_cures_masks_by_multiplication(case):
    assert not blamed(CURED, case)


# Memory that no kernel writes holds what was there before.


def unwritten(product, before):
    """The product, but rows of nobody, or gradients of groups without rows, as they were before."""

    def run(a, b, groups, **options):
        result = product(a, b, groups, **options)
        end = groups.first_row + jnp.sum(groups.sizes)
        written = jnp.arange(a.shape[0]) < end if result.ndim == 2 else groups.sizes > 0
        return jnp.where(written.reshape(-1, *(1,) * (result.ndim - 1)), result, before)

    return run


UNWRITTEN = {
    name: xla_but(**{product: unwritten(getattr(xla, product), before) for product in PRODUCTS})
    for name, before in (("NaN", np.nan), ("three", 3.0))
}


@EVERY_CASE
@pytest.mark.parametrize("before", UNWRITTEN)
def test_the_kit_finds_what_was_not_written(case, before):
    unused = sum(case.sizes) < case.shape.rows
    expected = {("grad_rhs", group) for group in empty_groups(case)}
    expected |= {("forward", None), ("grad_lhs", None)} if unused else set()
    assert blamed(UNWRITTEN[before], case) == expected


def one_group_too_large(lhs, dout, groups, **options):
    drhs = xla.grad_rhs(lhs, dout, groups, **options)
    return jnp.where((groups.sizes == 1)[:, None, None], 1.1 * drhs, drhs)


def test_the_kit_finds_a_small_wrong_group_that_a_tolerance_over_all_of_them_hides():
    case = CASES["127 rows"]
    rng = np.random.default_rng(0)
    lhs, dout = (jnp.asarray(rng.standard_normal((300, w)), jnp.float32) for w in (40, 72))
    _, right = reference.gradients(lhs, np.zeros((8, 40, 72)), case.sizes, dout)
    groups = LocalGroups(jnp.asarray(case.sizes), 0)
    got = one_group_too_large(lhs, dout, groups, transpose_rhs=False, dtype=jnp.float32)
    assert np.linalg.norm(got - right) < 1e-2 * np.linalg.norm(right)  # what many a test allows
    assert blamed(xla_but(grad_rhs=one_group_too_large), case) == {("grad_rhs", 1)}
