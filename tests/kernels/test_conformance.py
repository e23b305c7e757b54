"""Every implementation of grouped matmul that can run here passes the conformance kit.

TPU and Hopper kernels run in Pallas's simulators, which check for races and leave NaN in memory
that nobody wrote; most of their cases are marked `slow`.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import pytest

from moejax.kernels import compat
from moejax.kernels.grouped_matmul import IMPLEMENTATIONS, implementations
from moejax.kernels.grouped_matmul import conformance as kit

PORTABLE = ("tile_scan", "xla")
SIMULATED = ("tpu",)
EVERY = [*PORTABLE, *(pytest.param(name, marks=pytest.mark.slow) for name in SIMULATED)]
ORIENTATIONS = pytest.mark.parametrize("transpose_rhs", [False, True], ids=["KN", "NK"])


def ids(cases):
    return [case.name for case in cases]


@contextlib.contextmanager
def simulator(name):
    """Where the implementation can run here, and no race is found in it."""
    if name != "tpu":
        yield
        return
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    with compat.interpret_tpu(detect_races=True):
        yield
    assert not interpret_pallas_call.races.races_found


def check(name, case, **options):
    with simulator(name):
        assert not kit.failures(implementations.module(name), case, **options)


def test_every_implementation_is_tested_somewhere():
    elsewhere = {"hopper", "tokamax"}  # test_hopper_*.py, test_tokamax.py
    assert set(IMPLEMENTATIONS) == {*PORTABLE, *SIMULATED, *elsewhere}


@ORIENTATIONS
@pytest.mark.parametrize("case", kit.CASES, ids=ids(kit.CASES))
@pytest.mark.parametrize("name", EVERY)
def test_group_sizes(name, case, transpose_rhs):
    check(name, case, transpose_rhs=transpose_rhs)


@ORIENTATIONS
@pytest.mark.parametrize("name", SIMULATED)
def test_a_fast_case_in_the_simulator(name, transpose_rhs):
    check(
        name, next(c for c in kit.CASES if c.name == "rows left over"), transpose_rhs=transpose_rhs
    )


@pytest.mark.parametrize("case", kit.OFFSET_CASES, ids=ids(kit.OFFSET_CASES))
@pytest.mark.parametrize("name", EVERY)
def test_group_offset(name, case):
    check(name, case)


@pytest.mark.parametrize("case", kit.SHAPE_CASES, ids=ids(kit.SHAPE_CASES))
@pytest.mark.parametrize("name", EVERY)
def test_shapes(name, case):
    check(name, case)


@pytest.mark.parametrize("case", kit.CASES[::4], ids=ids(kit.CASES[::4]))
@pytest.mark.parametrize("name", EVERY)
def test_bfloat16(name, case):
    check(name, case, dtype="bfloat16")


@pytest.mark.long
@pytest.mark.parametrize("case", kit.WIDE_CASES, ids=ids(kit.WIDE_CASES))
@pytest.mark.parametrize("name", PORTABLE)
def test_wide(name, case):
    check(name, case, dtype="bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", PORTABLE)
def test_composed_glu(name, biased):
    glu = functools.partial(implementations.glu, name)
    for case in (kit.CASES[7], kit.OFFSET_CASES[5]):
        for dtype in ("float32", "bfloat16"):
            options = {"dtype": dtype, "activation": "swiglu_clamped", "biased": biased}
            assert not kit.glu_failures(glu, case, **options)


@pytest.mark.parametrize("name", PORTABLE)
def test_composed_glu_rounds_once_after_the_bias(name):
    """Two roundings exceed the tolerance in groups of one row."""
    glu = functools.partial(implementations.glu, name)
    options = {"dtype": "bfloat16", "activation": "silu", "biased": True}
    assert not kit.glu_failures(glu, kit.CASES[5], **options)


# What the kit is for: each of these defects was published in some library's kernels.


class Defective:
    """`tile_scan` with one product replaced."""

    def __init__(self, **replaced):
        from moejax.kernels.grouped_matmul import tile_scan

        for product in ("forward", "grad_lhs", "grad_rhs"):
            setattr(self, product, replaced.get(product, getattr(tile_scan, product)))


def names_of(defective, cases=kit.CASES):
    return {f"{f.product}, {f.case}" for case in cases for f in kit.failures(defective, case)}


def test_finds_a_transposed_gradient_of_one_small_group():
    from moejax.kernels.grouped_matmul import tile_scan

    def grad_rhs(lhs, dout, groups, **options):
        drhs = tile_scan.grad_rhs(lhs, dout, groups, **options)
        small = (groups.sizes == 1)[:, None, None]
        return jnp.where(small, drhs[::-1], drhs)

    assert "grad_rhs, rows left over" in names_of(Defective(grad_rhs=grad_rhs))


def test_finds_masks_by_multiplication():
    from moejax.kernels.grouped_matmul import tile_scan

    def grad_rhs(lhs, dout, groups, **options):
        held = groups.of_rows(jnp.ones(len(groups.sizes)), len(lhs))[:, None]
        part = jnp.einsum("rk,rn->kn", lhs * held, dout * held)
        return tile_scan.grad_rhs(lhs, dout, groups, **options) + 0 * part

    found = names_of(Defective(grad_rhs=grad_rhs))
    assert "grad_rhs, rows left over" in found
    assert "grad_rhs, balanced" not in found


def test_finds_rows_of_nobody_that_are_not_zero():
    from moejax.kernels.grouped_matmul import tile_scan

    def forward(lhs, rhs, groups, **options):
        held = groups.of_rows(jnp.ones(len(groups.sizes)), len(lhs))[:, None]
        return jnp.where(held > 0, tile_scan.forward(lhs, rhs, groups, **options), 1)

    assert "forward, rows left over" in names_of(Defective(forward=forward))


def test_finds_a_gradient_for_an_empty_group():
    from moejax.kernels.grouped_matmul import tile_scan

    def grad_rhs(lhs, dout, groups, **options):
        drhs = tile_scan.grad_rhs(lhs, dout, groups, **options)
        return jnp.where((groups.sizes == 0)[:, None, None], 1e-9, drhs)

    found = names_of(Defective(grad_rhs=grad_rhs))
    assert {f"grad_rhs, empty at the {where}" for where in ("start", "end")} < found
    assert "grad_rhs, all of size one" not in found


def test_finds_accumulation_in_bfloat16():
    def grad_rhs(lhs, dout, groups, **_):
        # Right in the kit's long group, but for the sum over tiles.
        parts = jnp.einsum(
            "crk,crn->ckn", *(a.reshape(-1, 64, a.shape[1])[:125] for a in (lhs, dout))
        )
        total, _ = jax.lax.scan(lambda s, part: (s + part, None), jnp.zeros_like(parts[0]), parts)
        return jnp.zeros((3, *total.shape), total.dtype).at[1].set(total)

    (failure,) = kit.failures(Defective(grad_rhs=grad_rhs), kit.WIDE_CASES[1], dtype="bfloat16")
    assert failure.product == "grad_rhs"
    assert "relative error" in failure.what
