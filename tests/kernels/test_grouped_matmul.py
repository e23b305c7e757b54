"""The conformance contract of grouped_matmul: every implementation and product, group by group."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as simulator

from moejax.kernels import compat
from moejax.kernels.grouped_matmul import IMPLEMENTATIONS, grouped_matmul, reference

# tile_scan and xla serve every dtype on every platform. TPU kernels run in Pallas's simulator here.
PORTABLE = ("tile_scan", "xla")
SIMULATED = [*PORTABLE, pytest.param("tpu", marks=pytest.mark.slow)]
ROWS, GROUPS, K, N = 300, 8, 40, 72  # heights 32 to 256; K and N are no multiples of 64

# Sizes are values: one compiled function per (implementation, orientation, dtype) serves them all.
CASES = {
    "balanced": [37, 38, 37, 38, 37, 38, 37, 38],
    "empty at the start": [0, 0, 50, 50, 50, 50, 50, 50],
    "empty in the middle": [70, 30, 0, 0, 0, 80, 60, 60],
    "empty at the end": [75, 75, 75, 74, 0, 0, 0, 0],
    "one takes all": [0, 0, 0, 300, 0, 0, 0, 0],
    "all of size one": [1] * 8,
    "no rows": [0] * 8,
    "rows left over": [20, 0, 60, 1, 33, 31, 64, 5],
    "one off a tile edge": [31, 33, 63, 65, 1, 95, 0, 0],
    "seven off a tile edge": [25, 39, 57, 71, 7, 89, 0, 0],
    "eight off a tile edge": [24, 40, 56, 72, 8, 88, 0, 0],
    "127 rows": [127, 1, 128, 0, 0, 0, 44, 0],
    "129 rows": [129, 0, 0, 0, 0, 127, 0, 44],
    "one more than the tallest tile": [257, 0, 1, 0, 0, 0, 42, 0],
}
TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2}


@functools.cache
def compiled(implementation: str, transpose_rhs: bool, with_offset: bool):
    """(lhs, rhs, sizes, offset, dout) -> (out, dlhs, drhs)."""

    @jax.jit
    def run(lhs, rhs, sizes, offset, dout):
        def product(lhs, rhs):
            return grouped_matmul(
                lhs,
                rhs,
                sizes,
                group_offset=offset if with_offset else None,
                transpose_rhs=transpose_rhs,
                implementation=implementation,
            )

        # TPU kernels run in Pallas's simulator: what is not written there is NaN.
        with compat.interpret_tpu(detect_races=True):
            out, vjp = jax.vjp(product, lhs, rhs)
            return out, *vjp(dout)

    return run


def operands(dtype: str, num_groups: int, transpose_rhs: bool, rows: int = ROWS):
    rng = np.random.default_rng(0)
    shape = (num_groups, N, K) if transpose_rhs else (num_groups, K, N)
    arrays = (rng.standard_normal(s) for s in ((rows, K), shape, (rows, N)))
    return tuple(jnp.asarray(a, dtype) for a in arrays)


def assert_equal_by_group(got, want, groups, dtype):
    """Relative Frobenius error of each group's part: a large group must not hide a small one."""
    for group, part in groups:
        a, b = np.asarray(got, np.float64)[part], want[part]
        error = np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)
        assert error < TOLERANCE[dtype] or b.size == 0, (group, error)


def check(implementation, sizes, *, dtype="float32", transpose_rhs=False, offset=None, held=GROUPS):
    lhs, rhs, dout = operands(dtype, held, transpose_rhs)
    parts = list(reference.group_rows(sizes, offset or 0, held))
    used = np.zeros(ROWS, bool)
    for _, rows in parts:
        used[rows] = True
    poison = lambda a: jnp.where(used[:, None], a, jnp.nan)
    run = compiled(implementation, transpose_rhs, offset is not None)
    out, dlhs, drhs = jax.block_until_ready(
        run(poison(lhs), rhs, jnp.asarray(sizes), jnp.asarray(offset or 0), poison(dout))
    )
    assert implementation != "tpu" or not simulator.races.races_found
    options = {"group_offset": offset or 0, "transpose_rhs": transpose_rhs}
    want = reference.grouped_matmul(lhs, rhs, sizes, **options)
    want_dlhs, want_drhs = reference.gradients(lhs, rhs, sizes, dout, **options)
    assert_equal_by_group(out, want, parts, dtype)
    assert_equal_by_group(dlhs, want_dlhs, parts, dtype)
    assert_equal_by_group(drhs, want_drhs, [(g, g) for g in range(held)], dtype)
    np.testing.assert_array_equal(np.asarray(out, np.float32)[~used], 0)
    np.testing.assert_array_equal(np.asarray(dlhs, np.float32)[~used], 0)
    return out, dlhs, drhs


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("transpose_rhs", [False, True], ids=["KN", "NK"])
@pytest.mark.parametrize("implementation", SIMULATED)
def test_matches_float64_by_group_with_nan_in_unused_rows(implementation, transpose_rhs, case):
    check(implementation, CASES[case], transpose_rhs=transpose_rhs)


@pytest.mark.parametrize("transpose_rhs", [False, True], ids=["KN", "NK"])
def test_tpu_kernels_in_the_simulator(transpose_rhs):
    check("tpu", CASES["rows left over"], transpose_rhs=transpose_rhs)


def test_every_implementation_is_tested():
    assert set(IMPLEMENTATIONS) == {*PORTABLE, "tpu"}


@pytest.mark.parametrize("case", ["balanced", "rows left over", "one takes all"])
@pytest.mark.parametrize("implementation", SIMULATED)
def test_bfloat16_accumulates_wide_and_keeps_dtypes(implementation, case):
    out, dlhs, drhs = check(implementation, CASES[case], dtype="bfloat16")
    assert out.dtype == dlhs.dtype == drhs.dtype == jnp.bfloat16


@pytest.mark.parametrize("implementation", SIMULATED)
def test_bfloat16_gradient_of_a_long_group_accumulates_across_tiles_in_float32(implementation):
    """16 tiles: adding their bfloat16 parts would be off by more than the last rounding."""
    rows = 16 * 512
    lhs = jnp.ones((rows, 4), jnp.bfloat16)
    dout = jnp.asarray(1 + np.random.default_rng(3).random((rows, 64)), jnp.bfloat16)
    rhs, sizes = jnp.zeros((2, 4, 64), jnp.bfloat16), jnp.asarray([rows, 0])
    _, _, drhs = compiled(implementation, False, False)(lhs, rhs, sizes, jnp.asarray(0), dout)
    want = np.asarray(dout, np.float64).sum(0)
    half_a_unit = 32  # in the last place of a bfloat16 between 8192 and 16384
    np.testing.assert_allclose(np.asarray(drhs[0], np.float64), [want] * 4, 0, half_a_unit + 1)


@pytest.mark.parametrize("offset", [0, 2, 5, 7])
@pytest.mark.parametrize("case", ["balanced", "rows left over", "empty in the middle"])
@pytest.mark.parametrize("implementation", SIMULATED)
def test_group_offset_holds_a_slice_of_the_groups(implementation, case, offset):
    """At offset 7, rhs holds two groups beyond the end: they are empty."""
    check(implementation, CASES[case], offset=offset, held=3)


@pytest.mark.parametrize("implementation", SIMULATED)
def test_more_groups_than_rows(implementation):
    rng = np.random.default_rng(1)
    sizes = np.bincount(rng.integers(0, 64, 20), minlength=64)
    lhs, rhs, dout = operands("float32", 64, False, rows=20)
    run = compiled(implementation, False, False)
    got = run(lhs, rhs, jnp.asarray(sizes), jnp.asarray(0), dout)
    want = (
        reference.grouped_matmul(lhs, rhs, sizes),
        *reference.gradients(lhs, rhs, sizes, dout),
    )
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [0, 1, 32, 33])
@pytest.mark.parametrize("implementation", SIMULATED)
def test_few_rows(implementation, rows):
    lhs, rhs, dout = operands("float32", 2, False, rows=rows)
    sizes = [rows // 2, rows - rows // 2]
    got = compiled(implementation, False, False)(lhs, rhs, jnp.asarray(sizes), jnp.asarray(0), dout)
    want = reference.grouped_matmul(lhs, rhs, sizes), *reference.gradients(lhs, rhs, sizes, dout)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", PORTABLE)
def test_preferred_element_type(implementation):
    lhs, rhs, _ = operands("bfloat16", GROUPS, False)
    sizes = CASES["balanced"]
    out = grouped_matmul(
        lhs,
        rhs,
        jnp.asarray(sizes),
        preferred_element_type=jnp.float32,
        implementation=implementation,
    )
    assert out.dtype == jnp.float32
    want = reference.grouped_matmul(lhs, rhs, sizes)
    np.testing.assert_allclose(out, want, rtol=2e-5, atol=2e-5)  # no rounding to bfloat16


@pytest.mark.parametrize("implementation", PORTABLE)
def test_float64_stays_float64(implementation):
    with jax.enable_x64(True):
        lhs, rhs, dout = operands("float64", 3, False, rows=30)
        sizes = jnp.asarray([7, 0, 20])
        got = compiled(implementation, False, False)(lhs, rhs, sizes, jnp.asarray(0), dout)
        want = reference.grouped_matmul(lhs, rhs, sizes)
        for a, b in zip(got, (want, *reference.gradients(lhs, rhs, sizes, dout)), strict=True):
            assert a.dtype == jnp.float64
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_tile_scan_never_reads_the_matrix_of_an_empty_group():
    lhs, rhs, dout = operands("float32", GROUPS, False)
    rhs = rhs.at[3].set(jnp.nan)
    sizes = jnp.asarray([20, 0, 60, 0, 33, 31, 64, 5])
    run = compiled("tile_scan", False, False)
    for value in run(lhs, rhs, sizes, jnp.asarray(0), dout):
        assert np.isfinite(value).all()


@pytest.mark.parametrize("implementation", PORTABLE)
def test_inside_scan_and_vmap(implementation):
    lhs, rhs, _ = operands("float32", 3, False, rows=30)
    sizes = jnp.asarray([[10, 10, 10], [7, 0, 20]])
    call = functools.partial(grouped_matmul, lhs, rhs, implementation=implementation)
    want = np.stack([reference.grouped_matmul(lhs, rhs, s) for s in sizes])
    scanned = jax.jit(lambda s: jax.lax.scan(lambda c, s: (c, call(s)), 0, s)[1])(sizes)
    np.testing.assert_allclose(scanned, want, rtol=1e-4, atol=1e-4)
    if implementation == "tile_scan":  # XLA's ragged dot has no such batching rule
        np.testing.assert_allclose(jax.jit(jax.vmap(call))(sizes), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("implementation", PORTABLE)
def test_inside_shard_map_with_replicated_matrices(implementation, check_vma):
    """Rows are sharded and rhs is not: its gradient is the sum over devices."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    shard, whole = jax.P("data"), jax.P()
    rng = np.random.default_rng(2)
    lhs, rhs, dout = operands("float32", GROUPS, False, rows=4 * 40)
    sizes = rng.multinomial(36, np.ones(GROUPS) / GROUPS, size=4)

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(shard, whole, shard, shard),
        out_specs=(shard, shard, whole),
        check_vma=check_vma,
    )
    def run(lhs, rhs, sizes, dout):
        out, vjp = jax.vjp(
            lambda a, b: grouped_matmul(a, b, sizes.reshape(-1), implementation=implementation),
            lhs,
            rhs,
        )
        dlhs, drhs = vjp(dout)
        return out, dlhs, drhs if check_vma else jax.lax.psum(drhs, "data")

    out, dlhs, drhs = run(lhs, rhs, jnp.asarray(sizes), dout)
    want_drhs = 0
    for p in range(4):
        rows = slice(40 * p, 40 * p + 40)
        want = reference.grouped_matmul(lhs[rows], rhs, sizes[p])
        want_dlhs, part = reference.gradients(lhs[rows], rhs, sizes[p], dout[rows])
        want_drhs += part
        np.testing.assert_allclose(out[rows], want, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(dlhs[rows], want_dlhs, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(drhs, want_drhs, rtol=1e-4, atol=1e-4)


def test_tile_scan_forms_no_dense_expansion():
    """No array of `G * R * K` elements, and temporaries of the order of the operands."""
    rows, groups, k, n = 1024, 32, 64, 64
    args = (
        jax.ShapeDtypeStruct((rows, k), jnp.float32),
        jax.ShapeDtypeStruct((groups, k, n), jnp.float32),
        jax.ShapeDtypeStruct((groups,), jnp.int32),
        jax.ShapeDtypeStruct((), jnp.int32),
        jax.ShapeDtypeStruct((rows, n), jnp.float32),
    )

    def lowered(implementation):
        return compiled(implementation, False, False).lower(*args)

    dense = f"{groups}x{rows}x{k}xf32"
    assert dense in lowered("xla").as_text()  # so the guard can fail
    ours = lowered("tile_scan")
    assert dense not in ours.as_text()
    operand_bytes = 4 * (rows * k + groups * k * n + rows * n)
    temporaries = ours.compile().memory_analysis().temp_size_in_bytes
    assert temporaries < 4 * operand_bytes < 4 * groups * rows * k
