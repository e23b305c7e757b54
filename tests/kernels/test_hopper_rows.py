"""The Hopper kernel of forward and grad_lhs, in Pallas's simulator of a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.kernels import compat
from moejax.kernels.grouped_matmul import conformance as kit
from moejax.kernels.grouped_matmul import reference, tile_scan
from moejax.kernels.grouped_matmul.groups import LocalGroups

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < (0, 11, 2), reason="needs jax's GPU simulator: jax 0.11.2 or newer"
)
if jax.__version_info__ >= (0, 11, 2):
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks as simulator

    from moejax.kernels.grouped_matmul.hopper import device, rows, staging, tasks
    from moejax.kernels.grouped_matmul.hopper.persistent import (
        HEIGHT,
        LANES,
        Blocks,
        choose_blocks,
    )

    # Two slots, so that the ring of shared memory turns often.
    class Small:
        forward = staticmethod(functools.partial(rows.forward, blocks=Blocks(64, 2)))
        grad_lhs = staticmethod(functools.partial(rows.grad_lhs, blocks=Blocks(64, 2)))
        grad_rhs = staticmethod(tile_scan.grad_rhs)

    class Chosen(Small):
        forward = staticmethod(rows.forward)
        grad_lhs = staticmethod(rows.grad_lhs)


# Three steps inside and two blocks of columns, or the reverse; nothing is padded but the rows.
STEPS = kit.Shape(rows=300, inner=192, outer=128, held=8)
EDGES = {  # a tile is 128 rows, a warpgroup's part 64, a tile's start a multiple of 8
    "tiles end with groups": (128, 64, 0, 72, 0, 8, 28, 0),
    "one off a half": (63, 65, 1, 127, 0, 0, 44, 0),
    "seven off a start": (7, 1, 9, 15, 0, 129, 121, 18),
    "rows left over": (20, 0, 60, 1, 33, 31, 64, 5),
}


def simulate(check):
    """The result of `check` in the simulator, where it must find no race."""
    with compat.interpret_gpu(detect_races=True):
        result = check()
        assert not simulator.get_races().races_found
    return result


def conforms(case, kernels="Small", **options):
    kernels = globals()[kernels]
    options = {"dtype": "bfloat16", **options}
    assert not simulate(lambda: kit.failures(kernels, case, **options))


@pytest.mark.parametrize("transpose_rhs", [False, True], ids=["KN", "NK"])
def test_matches_float64_by_group_with_nan_in_unused_rows(transpose_rhs):
    """One fast case of each orientation, with steps, several blocks and edges."""
    name = "rows left over"
    conforms(kit.Case(name, EDGES[name], STEPS), transpose_rhs=transpose_rhs)


@pytest.mark.slow
@pytest.mark.parametrize("case", EDGES)
@pytest.mark.parametrize("transpose_rhs", [False, True], ids=["KN", "NK"])
def test_edges_of_tiles(transpose_rhs, case):
    conforms(kit.Case(case, EDGES[case], STEPS), transpose_rhs=transpose_rhs)


@pytest.mark.slow
@pytest.mark.parametrize("case", kit.CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("transpose_rhs", [False, True], ids=["KN", "NK"])
def test_group_sizes(transpose_rhs, case):
    conforms(case, transpose_rhs=transpose_rhs)


@pytest.mark.slow
@pytest.mark.parametrize("case", kit.OFFSET_CASES, ids=lambda case: case.name)
def test_group_offset(case):
    conforms(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", kit.SHAPE_CASES, ids=lambda case: case.name)
def test_shapes(case):
    conforms(case, "Chosen")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("transpose_rhs", [False, True], ids=["KN", "NK"])
def test_chosen_blocks_and_dtypes(transpose_rhs, dtype):
    """A last block of columns that hangs over the edge, in the weights and in the result."""
    shape = kit.Shape(rows=300, inner=64, outer=320, held=8)
    case = kit.Case("balanced", EDGES["rows left over"], shape)
    conforms(case, "Chosen", dtype=dtype, transpose_rhs=transpose_rhs)


@pytest.mark.slow
def test_float32_results_are_not_rounded():
    rng = np.random.default_rng(0)
    lhs, rhs = (
        jnp.asarray(rng.standard_normal(s), jnp.bfloat16) for s in ((200, 128), (3, 128, 64))
    )
    sizes = np.array([70, 0, 100])
    groups = LocalGroups(jnp.asarray(sizes, jnp.int32), 0)
    run = functools.partial(Small.forward, transpose_rhs=False, dtype=jnp.float32)
    out = simulate(lambda: jax.block_until_ready(run(lhs, rhs, groups)))
    assert out.dtype == jnp.float32
    want = reference.grouped_matmul(lhs, rhs, sizes)
    np.testing.assert_allclose(out, want, rtol=2e-5, atol=2e-5)


@pytest.mark.slow
def test_two_runs_are_bit_equal():
    case = kit.Case("edges", EDGES["seven off a start"], STEPS)
    assert not simulate(lambda: kit.differences_between_runs(Small, case, dtype="bfloat16"))


@functools.partial(jax.jit, static_argnums=2)
def planned(sizes, first_row, num_rows):
    return tasks.plan(LocalGroups(sizes, first_row), num_rows, HEIGHT)


@pytest.mark.parametrize("first_row", [0, 1, 13, 96])
@pytest.mark.parametrize("sizes", [*EDGES.values(), (0,) * 8, (500, 0, 3), (1,) * 40])
def test_tasks_store_every_row_once_from_aligned_tiles(sizes, first_row):
    num_rows = 300
    starts = np.minimum(first_row + np.cumsum([0, *sizes]), num_rows)
    owner = np.full(num_rows, len(sizes))
    for group in range(len(sizes)):
        owner[starts[group] : starts[group + 1]] = group

    plan = planned(jnp.asarray(sizes, jnp.int32), jnp.int32(first_row), num_rows)
    plan = jax.tree.map(np.asarray, plan)
    of_groups, total = plan.counts
    assert total <= plan.group.size
    stored = np.zeros(num_rows, int)
    for i in range(total):
        start, stop = plan.start[i], plan.stop[i]
        assert plan.row[i] % tasks.ALIGNMENT == 0
        assert plan.row[i] <= start < stop <= plan.row[i] + HEIGHT
        assert (owner[start:stop] == (plan.group[i] if i < of_groups else len(sizes))).all()
        stored[start:stop] += 1
    np.testing.assert_array_equal(stored, 1)


@pytest.mark.parametrize("num_tiles", [0, 1, 15, 16, 17, 40])
@pytest.mark.parametrize("columns", [1, 3, 8])
def test_order_deals_out_every_pair_once(num_tiles, columns):
    order = tasks.Order(columns, 132)
    pair = jax.jit(jax.vmap(order._pair, (0, None)))
    tile, column = pair(jnp.arange(num_tiles * columns), jnp.int32(num_tiles))
    got = set(zip(tile.tolist(), column.tolist(), strict=True))
    assert got == {(t, c) for t in range(num_tiles) for c in range(columns)}
    assert len(got) == tile.size


@pytest.mark.parametrize("num_weights", [1, 2])
@pytest.mark.parametrize("width", [64, 192, 768, 1024, 2048, 2880, 4096, 7168, 14336])
def test_blocks_fit_into_shared_memory(width, num_weights):
    blocks = choose_blocks(width, num_weights, jnp.bfloat16)
    ring = blocks.stages * 2 * LANES * (HEIGHT + num_weights * blocks.columns)
    assert ring + staging.num_bytes(2, 64) < device.SHARED_MEMORY_BYTES
    assert blocks.stages >= 4
    assert num_weights * blocks.columns <= 256


def test_gpt_oss_has_no_overhanging_block():
    assert choose_blocks(2880, 1, jnp.bfloat16).columns == 192


@pytest.mark.parametrize(
    ("dtype", "obstacle"),
    [("float32", "tf32"), ("float64", "not float64"), ("bfloat16", "this is cpu")],
)
def test_obstacles(dtype, obstacle):
    assert obstacle in device.obstacle(dtype)


def test_no_obstacle_in_the_simulator():
    with compat.interpret_gpu():
        assert device.obstacle("bfloat16") is None
        assert device.obstacle("float16") is None


def test_another_generation_is_an_obstacle():
    mesh = jax.sharding.AbstractMesh(
        (1,),
        ("x",),
        (jax.sharding.AxisType.Auto,),
        abstract_device=jax.sharding.AbstractDevice(
            device_kind="NVIDIA A100-SXM4-80GB", num_cores=108, platform="gpu"
        ),
    )
    with jax.sharding.use_abstract_mesh(mesh):
        assert "A100" in device.obstacle("bfloat16")
        assert device.num_multiprocessors() == 108
