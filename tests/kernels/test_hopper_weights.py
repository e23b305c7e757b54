"""The Hopper kernel of grouped_matmul's weight gradient, in Pallas's simulator of a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.kernels import compat
from moejax.kernels.grouped_matmul.groups import LocalGroups

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < (0, 11, 2), reason="needs jax's GPU simulator: jax 0.11.2 or newer"
)
if jax.__version_info__ >= (0, 11, 2):
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks as simulator

    from moejax.kernels.grouped_matmul.hopper import weights
    from moejax.kernels.grouped_matmul.hopper.weights_kernel import Blocks, locate

SMALL = (128, 64, 2, 2)  # a ring of two slots turns often
ROWS, K, N = 304, 64, 64
CASES = {  # 64 rows at a time, from a multiple of 8
    "balanced": [37, 38, 37, 38, 37, 38, 37, 38],
    "empty at the start": [0, 0, 50, 50, 50, 50, 50, 50],
    "empty in the middle": [70, 30, 0, 0, 0, 80, 60, 60],
    "empty at the end": [75, 75, 75, 74, 0, 0, 0, 0],
    "one takes all": [0, 0, 0, 304, 0, 0, 0, 0],
    "all of size one": [1] * 8,
    "no rows": [0] * 8,
    "rows left over": [20, 0, 60, 1, 33, 31, 64, 5],
    "one off a tile edge": [63, 65, 1, 127, 0, 0, 0, 0],
    "seven off a tile edge": [57, 71, 7, 121, 0, 0, 0, 0],
    "eight off a tile edge": [56, 72, 8, 120, 0, 0, 0, 0],
    "127 rows": [127, 1, 128, 0, 0, 0, 44, 0],
    "129 rows": [129, 0, 0, 0, 0, 127, 0, 44],
    "on tile edges": [64, 128, 0, 64, 0, 0, 0, 0],
}
# A result is exact but for float32 sums of at most 304 terms, and its own rounding.
TOLERANCE = {"float32": 2e-6, "bfloat16": 3e-3, "float16": 4e-4}


@functools.cache
def compiled(transpose_rhs: bool, out: str, blocks: tuple | None):
    """(lhs, dout, sizes, first_row) -> drhs."""

    @jax.jit
    def run(lhs, dout, sizes, first_row):
        groups = LocalGroups(sizes, first_row)
        cut = None if blocks is None else Blocks(*blocks)
        return weights.grad_rhs(
            lhs, dout, groups, transpose_rhs=transpose_rhs, dtype=out, blocks=cut
        )

    return run


def simulate(run, *args):
    with compat.interpret_gpu(detect_races=True):
        result = jax.block_until_ready(run(*args))
        assert not simulator.get_races().races_found
    return np.asarray(result, np.float64)


def check(
    sizes,
    *,
    first_row=0,
    rows=ROWS,
    k=K,
    n=N,
    dtype="bfloat16",
    out="float32",
    transpose_rhs=False,
    blocks=SMALL,
):
    """Every group's relative error; rows of nobody hold NaN in both operands."""
    rng = np.random.default_rng(0)
    lhs, dout = (jnp.asarray(rng.standard_normal((rows, w)), dtype) for w in (k, n))
    ends = first_row + np.cumsum(sizes)
    used = (np.arange(rows) >= first_row) & (np.arange(rows) < ends[-1])
    poisoned = (jnp.where(used[:, None], x, jnp.nan) for x in (lhs, dout))
    run = compiled(transpose_rhs, out, blocks)
    got = simulate(run, *poisoned, jnp.asarray(sizes, jnp.int32), jnp.int32(first_row))

    left, right = (dout, lhs) if transpose_rhs else (lhs, dout)
    left, right = np.asarray(left, np.float64), np.asarray(right, np.float64)
    assert got.shape == (len(sizes), left.shape[1], right.shape[1])
    for group, (size, end) in enumerate(zip(sizes, ends, strict=True)):
        want = left[end - size : end].T @ right[end - size : end]
        error = np.linalg.norm(got[group] - want) / max(np.linalg.norm(want), 1e-30)
        assert error < TOLERANCE[out], (group, error)


def test_matches_float64_with_nan_in_unused_rows():
    check(CASES["rows left over"])


def test_transposed_with_rows_before_the_first_group():
    check(CASES["rows left over"], first_row=13, rows=320, out="bfloat16", transpose_rhs=True)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_sizes(case):
    check(CASES[case])


@pytest.mark.slow
@pytest.mark.parametrize("first_row", [1, 7, 8, 64, 90])
def test_first_row(first_row):
    check(CASES["rows left over"], first_row=first_row, out="bfloat16", transpose_rhs=True)


@pytest.mark.slow
@pytest.mark.parametrize("out", TOLERANCE)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtypes(dtype, out):
    check(CASES["rows left over"], dtype=dtype, out=out)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "k", "n", "blocks"),
    [
        (304, 192, 320, (128, 128, 3, 2)),  # several blocks, the last ones over the edge
        (304, 320, 64, (256, 64, 2, 3)),
        (304, 48, 80, None),  # narrower swizzles
        (301, 40, 72, None),  # padded
        (33, 1, 1, None),
        (1, 16, 16, None),
        (304, 320, 320, None),  # 5 times 64, as 2880 is 45 times: over the edge both ways
    ],
)
@pytest.mark.parametrize("out", ["float32", "bfloat16"])
def test_shapes(rows, k, n, blocks, out):
    sizes = [rows // 3, 0, rows - rows // 3] if rows > 1 else [0, 1, 0]
    check(sizes, rows=rows, k=k, n=n, out=out, blocks=blocks)


@pytest.mark.slow
@pytest.mark.parametrize("transpose_rhs", [False, True])
def test_a_wider_cotangent_is_taken_in_the_dtype_of_the_rows(transpose_rhs):
    rng = np.random.default_rng(5)
    lhs = jnp.asarray(rng.standard_normal((ROWS, 64)), jnp.bfloat16)
    dout = jnp.asarray(rng.standard_normal((ROWS, 64)), jnp.float32)
    rest = jnp.asarray(CASES["balanced"]), jnp.int32(0)
    run = compiled(transpose_rhs, "float32", SMALL)
    want = simulate(run, lhs, dout.astype(jnp.bfloat16), *rest)
    np.testing.assert_array_equal(simulate(run, lhs, dout, *rest), want)


@pytest.mark.slow
def test_more_groups_than_rows():
    check([0, 1, 0, 2, 0, 1, 1, 0], rows=5)


@pytest.mark.slow
def test_a_long_group_is_summed_in_float32():
    """Sums of bfloat16 parts would be off by more than the last rounding."""
    rows = 4096
    lhs = jnp.ones((rows, 64), jnp.bfloat16)
    dout = jnp.asarray(1 + np.random.default_rng(3).random((rows, 64)), jnp.bfloat16)
    run = compiled(False, "bfloat16", SMALL)
    drhs = simulate(run, lhs, dout, jnp.asarray([rows, 0]), jnp.int32(0))
    want = np.asarray(dout, np.float64).sum(0)
    half_a_unit = 16  # in the last place of a bfloat16 between 4096 and 8192
    np.testing.assert_allclose(drhs[0], [want] * 64, 0, half_a_unit + 1)


@pytest.mark.slow
def test_two_runs_are_bit_equal():
    rng = np.random.default_rng(4)
    lhs, dout = (jnp.asarray(rng.standard_normal((ROWS, 64)), jnp.bfloat16) for _ in range(2))
    args = (lhs, dout, jnp.asarray(CASES["rows left over"]), jnp.int32(0))
    first, second = (simulate(compiled(False, "float32", SMALL), *args) for _ in range(2))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("height", [16, 64, 768, 1024, 2048, 2880, 4096, 7168, 14336])
@pytest.mark.parametrize("width", [16, 64, 768, 1024, 2048, 2880, 4096, 7168, 14336])
def test_blocks_fit(height, width):
    """Shared memory in bytes, registers of float32 sums per thread of two warpgroups."""
    cut = weights.choose_blocks(height, width)
    ring = cut.slots * 64 * (cut.height + cut.width) * 2
    assert ring + cut.stores * 2 * 64 * 128 <= 232448 - 1024
    assert cut.height * cut.width <= 2 * 128 * 128
    assert cut.slots >= 4
    assert cut.stores >= 2


@pytest.mark.parametrize("rows", [1, 7, 23])
@pytest.mark.parametrize("columns", [1, 7, 8, 9, 15, 16, 17])
def test_every_block_is_located_once(rows, columns):
    count = rows * columns
    shape = (rows, columns)
    row, column = jax.jit(lambda i: locate(i, shape))(jnp.arange(count, dtype=jnp.int32))
    assert sorted(np.asarray(row) * columns + np.asarray(column)) == list(range(count))
    assert np.max(row) == rows - 1


def test_groups_with_most_rows_come_first():
    groups = LocalGroups(jnp.asarray([3, 0, 9, 5]), jnp.int32(2))
    runs = weights.sort_groups(groups, 100)
    np.testing.assert_array_equal(runs.group, [2, 3, 0, 1])
    np.testing.assert_array_equal(runs.start, [5, 14, 2, 5])
    np.testing.assert_array_equal(runs.stop, [14, 19, 5, 5])
