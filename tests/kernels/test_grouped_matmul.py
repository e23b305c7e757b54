"""The public grouped_matmul: its gradient, its dtypes, and what transforms it works under.

That each implementation's products are right is the conformance kit's (test_conformance.py).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.kernels.grouped_matmul import grouped_matmul, reference, tile_scan
from moejax.kernels.grouped_matmul.groups import LocalGroups

PORTABLE = ("tile_scan", "xla")
GROUPS, K, N = 8, 40, 72
SIZES = [20, 0, 60, 1, 33, 31, 64, 5]  # of 300 rows


@functools.cache
def compiled(implementation: str, transpose_rhs: bool = False, with_offset: bool = False):
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

        out, vjp = jax.vjp(product, lhs, rhs)
        return out, *vjp(dout)

    return run


def operands(dtype: str, num_groups: int, transpose_rhs: bool = False, rows: int = 300):
    rng = np.random.default_rng(0)
    shape = (num_groups, N, K) if transpose_rhs else (num_groups, K, N)
    arrays = (rng.standard_normal(s) for s in ((rows, K), shape, (rows, N)))
    return tuple(jnp.asarray(a, dtype) for a in arrays)


def definition(lhs, rhs, sizes, dout, **options):
    gradients = reference.gradients(lhs, rhs, sizes, dout, **options)
    return reference.grouped_matmul(lhs, rhs, sizes, **options), *gradients


@pytest.mark.slow
@pytest.mark.parametrize("transpose_rhs", [False, True], ids=["KN", "NK"])
@pytest.mark.parametrize("offset", [None, 2])
@pytest.mark.parametrize("implementation", PORTABLE)
def test_value_and_gradients(implementation, offset, transpose_rhs):
    lhs, rhs, dout = operands("float32", GROUPS if offset is None else 3, transpose_rhs)
    run = compiled(implementation, transpose_rhs, offset is not None)
    got = run(lhs, rhs, jnp.asarray(SIZES), jnp.asarray(offset or 0), dout)
    options = {"group_offset": offset or 0, "transpose_rhs": transpose_rhs}
    for a, b in zip(got, definition(lhs, rhs, SIZES, dout, **options), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", PORTABLE)
def test_a_group_before_the_first_is_empty_and_not_the_last(implementation):
    lhs, rhs, dout = operands("float32", 3)
    out, dlhs, drhs = compiled(implementation, False, True)(
        lhs, rhs, jnp.asarray(SIZES), jnp.int32(-1), dout
    )
    want = definition(lhs, rhs[1:], SIZES, dout, group_offset=0)
    for a, b in zip((out, dlhs, drhs[1:]), want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(drhs[0], 0)


@pytest.mark.parametrize("implementation", PORTABLE)
def test_no_rows(implementation):
    lhs, rhs, dout = operands("float32", 2, rows=0)
    out, dlhs, drhs = compiled(implementation)(
        lhs, rhs, jnp.zeros(2, jnp.int32), jnp.int32(0), dout
    )
    assert out.shape == (0, N)
    assert dlhs.shape == (0, K)
    np.testing.assert_array_equal(drhs, np.zeros((2, K, N)))


@pytest.mark.parametrize("implementation", PORTABLE)
def test_mixed_dtypes_compute_in_the_wider_and_gradients_keep_their_own(implementation):
    lhs, rhs, dout = operands("float32", GROUPS)
    lhs = lhs.astype(jnp.bfloat16)
    out, dlhs, drhs = compiled(implementation)(lhs, rhs, jnp.asarray(SIZES), jnp.int32(0), dout)
    assert (out.dtype, dlhs.dtype, drhs.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    want, want_dlhs, want_drhs = definition(lhs, rhs, SIZES, dout)
    np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(drhs, want_drhs, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.asarray(dlhs, np.float32), want_dlhs, rtol=4e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", PORTABLE)
def test_preferred_element_type(implementation):
    lhs, rhs, _ = operands("bfloat16", GROUPS)
    sizes = SIZES
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
        lhs, rhs, dout = operands("float64", 3, rows=30)
        sizes = jnp.asarray([7, 0, 20])
        got = compiled(implementation)(lhs, rhs, sizes, jnp.asarray(0), dout)
        want = reference.grouped_matmul(lhs, rhs, sizes)
        for a, b in zip(got, (want, *reference.gradients(lhs, rhs, sizes, dout)), strict=True):
            assert a.dtype == jnp.float64
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_tile_scan_never_reads_the_matrix_of_an_empty_group():
    lhs, rhs, dout = operands("float32", GROUPS)
    rhs = rhs.at[3].set(jnp.nan)
    sizes = jnp.asarray([20, 0, 60, 0, 33, 31, 64, 5])
    run = compiled("tile_scan")
    for value in run(lhs, rhs, sizes, jnp.asarray(0), dout):
        assert np.isfinite(value).all()


@pytest.mark.parametrize("implementation", PORTABLE)
def test_inside_scan_and_vmap(implementation):
    lhs, rhs, _ = operands("float32", 3, rows=30)
    sizes = jnp.asarray([[10, 10, 10], [7, 0, 20]])
    call = functools.partial(grouped_matmul, lhs, rhs, implementation=implementation)
    want = np.stack([reference.grouped_matmul(lhs, rhs, s) for s in sizes])
    scanned = jax.jit(lambda s: jax.lax.scan(lambda c, s: (c, call(s)), 0, s)[1])(sizes)
    np.testing.assert_allclose(scanned, want, rtol=1e-4, atol=1e-4)
    if implementation == "tile_scan":  # XLA's ragged dot has no such batching rule
        np.testing.assert_allclose(jax.jit(jax.vmap(call))(sizes), want, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("implementation", PORTABLE)
def test_inside_shard_map_with_replicated_matrices(implementation, check_vma):
    """Rows are sharded and rhs is not: its gradient is the sum over devices."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    shard, whole = jax.P("data"), jax.P()
    rng = np.random.default_rng(2)
    lhs, rhs, dout = operands("float32", GROUPS, rows=4 * 40)
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
        return compiled(implementation).lower(*args)

    dense = f"{groups}x{rows}x{k}xf32"
    assert dense in lowered("xla").as_text()  # so the guard can fail
    ours = lowered("tile_scan")
    assert dense not in ours.as_text()
    operand_bytes = 4 * (rows * k + groups * k * n + rows * n)
    temporaries = ours.compile().memory_analysis().temp_size_in_bytes
    assert temporaries < 4 * operand_bytes < 4 * groups * rows * k


@pytest.mark.parametrize("product", ["forward", "grad_lhs", "grad_rhs"])
def test_tile_scan_needs_no_temporary_larger_than_its_output(product):
    """In float32: a bfloat16 weight gradient is summed in float32 first, twice its size."""
    rows, groups, k, n = 4096, 64, 64, 96
    shapes = {"lhs": (rows, k), "rhs": (groups, k, n), "dout": (rows, n)}
    used = {"forward": ("lhs", "rhs"), "grad_lhs": ("dout", "rhs"), "grad_rhs": ("lhs", "dout")}

    def run(a, b, sizes):
        function = getattr(tile_scan, product)
        return function(a, b, LocalGroups(sizes, 0), transpose_rhs=False, dtype=jnp.float32)

    arguments = [jax.ShapeDtypeStruct(shapes[name], jnp.float32) for name in used[product]]
    lowered = jax.jit(run).lower(*arguments, jax.ShapeDtypeStruct((groups,), jnp.int32))
    memory = lowered.compile().memory_analysis()
    assert 0 < memory.temp_size_in_bytes < memory.output_size_in_bytes
