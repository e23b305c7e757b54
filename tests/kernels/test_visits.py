"""Visits cover every row once, in order, and every group at least once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.kernels.grouped_matmul.groups import LocalGroups
from moejax.kernels.grouped_matmul.visits import visits_of_groups, visits_of_rows

HEIGHT = 8
CASES = {
    "balanced": ([10, 10, 10], 30, 0),
    "on the edges of tiles": ([8, 16, 8], 32, 0),
    "rows left over": ([3, 0, 9], 30, 0),
    "rows before": ([3, 0, 9], 30, 11),
    "no rows": ([0, 0, 0], 30, 0),
    "one takes all": ([0, 30, 0], 30, 0),
    "no group reaches": ([0, 0, 0], 30, 30),
    "one row": ([0, 1, 0], 1, 0),
}


@functools.partial(jax.jit, static_argnums=(0, 3))
def visits_by(rule, sizes, first, num_rows):
    return rule(LocalGroups(sizes, first), num_rows, HEIGHT)


def pairs(visits):
    """Used visits as (group, rows that it adds)."""
    arrays = jax.tree.map(np.asarray, visits)
    for group, tile, start, stop in zip(*jax.tree.leaves(arrays), strict=True):
        first = max(start, tile * HEIGHT)
        yield int(group), list(range(first, min(stop, (tile + 1) * HEIGHT)))


@pytest.mark.parametrize("case", CASES)
def test_every_row_is_visited_once_by_its_group(case):
    sizes, num_rows, first = CASES[case]
    owner = np.full(num_rows, len(sizes))
    owner[first : first + sum(sizes)] = np.repeat(np.arange(len(sizes)), sizes)
    visits = visits_by(visits_of_rows, jnp.asarray(sizes), jnp.int32(first), num_rows)
    seen = [(row, group) for group, rows in pairs(visits) for row in rows]
    assert seen == list(enumerate(owner))


@pytest.mark.parametrize("case", CASES)
def test_every_group_is_visited_without_a_gap(case):
    sizes, num_rows, first = CASES[case]
    visits = visits_by(visits_of_groups, jnp.asarray(sizes), jnp.int32(first), num_rows)
    visits = list(pairs(visits))
    order = [group for group, _ in visits]
    assert order == sorted(order)  # a group's visits follow one another
    assert set(order) == set(range(len(sizes)))
    starts = first + np.cumsum(sizes) - sizes
    for group, size in enumerate(sizes):
        rows = [row for g, part in visits if g == group for row in part]
        assert rows == list(range(starts[group], starts[group] + size))
