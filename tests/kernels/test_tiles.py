import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.kernels.tiles import plan_tiles, scan_tiles, tile_heights

TOTAL = 1100


@jax.jit
def visits(sizes, first_row):
    """How often the loop over tiles visits each row, the group it gives it, and the row count."""

    def body(tile, carry):
        count, group, rows = carry
        one = jnp.ones(tile.inside.shape, jnp.int32)
        count = tile.store(count, tile.load(count) + one)
        return count, tile.store(group, tile.group * one), rows + tile.inside.size

    zeros = jnp.zeros(TOTAL, jnp.int32)
    tiles = plan_tiles(sizes, TOTAL, first_row=first_row)
    return scan_tiles(tiles, body, (zeros, zeros - 1, jnp.zeros((), jnp.int32)))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([0, 0, 1, 31, 32, 33, 97, 256, 511, 512, 513, 1024]), max_size=6),
    st.sampled_from([0, 1, 40]),
)
def test_every_row_of_a_group_is_visited_once_by_its_group(sizes, first_row):
    sizes = np.asarray((sizes + [0] * 6)[:6])
    total = np.minimum(np.cumsum(sizes), TOTAL - first_row)
    sizes = np.diff(total, prepend=0)
    count, group, rows = visits(jnp.asarray(sizes), jnp.asarray(first_row))
    owner = np.full(TOTAL, -1)
    owner[first_row : first_row + sizes.sum()] = np.repeat(np.arange(6), sizes)
    np.testing.assert_array_equal(group, owner)
    np.testing.assert_array_equal(count, owner >= 0)
    assert rows <= 1.5 * sizes.sum() + tile_heights(TOTAL, 6)[0] * 6  # what rounding up costs


@pytest.mark.parametrize("mean", [100, 128, 256, 512, 700, 2048, 5000])
def test_balanced_groups_are_hardly_padded(mean):
    sizes = np.random.default_rng(0).poisson(mean, 64)
    heights = tile_heights(mean * 64, 64)
    assert len(heights) <= 14  # one loop to compile for each
    rest = sizes % heights[-1]
    padded = sizes - rest + np.asarray([0, *heights])[np.searchsorted([0, *heights], rest)]
    assert padded.sum() <= 1.15 * sizes.sum()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([0, 1, 31, 97, 256, 511, 1024, 2048]), max_size=6),
    st.sampled_from([0, 40]),
)
def test_each_group_gets_the_sum_over_its_tiles(sizes, first_row):
    sizes = np.asarray((sizes + [0] * 6)[:6])
    sizes = np.diff(np.minimum(np.cumsum(sizes), 2500 - first_row), prepend=0)
    np.testing.assert_array_equal(counts(jnp.asarray(sizes), jnp.asarray(first_row)), sizes)


@jax.jit
def counts(sizes, first_row):
    """Rows of each group, added up tile by tile."""
    body = lambda tile, carry: tile.add_to_group(carry, jnp.sum(tile.inside, dtype=jnp.int32))
    tiles = plan_tiles(sizes, 2500, first_row=first_row)
    return scan_tiles(tiles, body, jnp.zeros(6, jnp.int32))


@pytest.mark.parametrize("total", [1, 31, 32, 33, 512, 513])
def test_heights_fit_the_rows(total):
    heights = []

    @jax.jit
    def num_rows_in_tiles(sizes):
        tiles = plan_tiles(sizes, total)
        heights.extend(tiles.heights)  # Python numbers
        used = jnp.arange(tiles.num_rows.size) < tiles.height_ends[-1]
        return jnp.sum(jnp.where(used, tiles.num_rows, 0))

    assert num_rows_in_tiles(jnp.asarray([total])) == total
    assert max(heights) <= total


def test_sizes_beyond_the_rows_are_cut():
    count, _, _ = visits(jnp.asarray([600, 600, 0, 0, 0, 5]), jnp.asarray(0))
    np.testing.assert_array_equal(count, 1)
