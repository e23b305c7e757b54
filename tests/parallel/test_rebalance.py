"""The ladder of plans: which one is taken, that what it promises holds, and what is derived."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moejax.errors import UserError
from moejax.parallel import planners
from moejax.parallel.rebalance import (
    ceil_of_mean,
    min_chunk_from,
    num_rows,
    rebalance,
    split_by_source,
    truncated,
)
from tests.parallel.random_loads import random_loads


@functools.partial(jax.jit, static_argnums=(0,), static_argnames=("options",))
def plans(num_devices, loads, *, options):
    return jax.lax.map(lambda x: rebalance(x, num_devices, **dict(options)), loads)


def plan_of(loads, num_devices, **options):
    """One plan, as numpy arrays, without the axis of the loads."""
    found = plans(num_devices, np.int32([loads]), options=tuple(options.items()))
    return jax.tree.map(lambda x: np.asarray(x)[0], found)


def is_foreign(num_experts, num_devices):
    owner = np.arange(num_experts) // (num_experts // num_devices)
    return owner[:, None] != np.arange(num_devices)


def check(plan, loads, *, num_rows, num_slots):
    """What holds for every plan, whatever its rung."""
    plan = jax.tree.map(np.asarray, plan)
    num_experts, num_devices = plan.rows.shape[1:]
    np.testing.assert_array_equal(plan.rows.sum(2, dtype=np.int64), loads)
    assert plan.rows.min() >= 0
    most = plan.rows.sum(1, dtype=np.int64).max(1)
    np.testing.assert_array_equal(plan.most_rows, most)
    foreign = (plan.rows > 0) & is_foreign(num_experts, num_devices)
    np.testing.assert_array_equal(plan.has_foreign, foreign.any((1, 2)))
    assert plan.slots.shape[1:] == (num_devices, num_slots)
    for case in range(0, len(loads), 7):
        for device in range(num_devices):
            ids = np.flatnonzero(foreign[case, :, device])
            padding = [num_experts] * (num_slots - len(ids))  # fails if they are too many
            np.testing.assert_array_equal(plan.slots[case, device], [*ids, *padding])
    return most, foreign.sum(1).max(1)


OPTIONS = {"alpha": 1.05, "skip_below": 1.3, "min_chunk": 100}


@pytest.mark.slow
@pytest.mark.parametrize("num_slots", [0, 1, 2, 4])
def test_plans_keep_rows_and_slots(num_slots):
    """10,000 loads in all; with E/P slots, one round is always enough."""
    loads = random_loads(2500, 32, 8, most=80_000, seed=num_slots)
    limits = {"num_rows": 13_000, "num_slots": num_slots}
    plan = plans(8, loads, options=tuple((OPTIONS | limits).items()))
    most, num_foreign = check(plan, loads, **limits)
    assert num_foreign.max() == num_slots
    assert (most > 13_000).any() == (num_slots < 4)


def test_one_round_with_rows_for_no_more_than_the_mean():
    loads = random_loads(700, 24, 6, most=60_000, seed=8)
    limits = {"num_rows": 10_000, "num_slots": 4}
    most, _ = check(plans(6, loads, options=tuple((OPTIONS | limits).items())), loads, **limits)
    assert most.max() == 10_000


HOT = [900, 0, 0, 0, 50, 50, 0, 0]  # of 1000 rows on 4 devices: C = 263


def test_first_rung_native():
    options = {"min_chunk": 1, "num_rows": 900, "num_slots": 2}
    plan = plan_of(HOT, 4, skip_below=3.61, **options)
    np.testing.assert_array_equal(plan.rows, planners.native(jnp.int32(HOT), 4))
    assert not plan.has_foreign
    assert plan.most_rows == 900
    assert (plan.slots == 8).all()
    # The load must be below the threshold, not at it, and within the rows.
    assert plan_of(HOT, 4, skip_below=3.6, **options).has_foreign
    assert plan_of(HOT, 4, skip_below=3.61, **options | {"num_rows": 899}).has_foreign


def test_second_rung_least_loaded():
    plan = plan_of(HOT, 4, min_chunk=1, num_rows=263, num_slots=2)
    np.testing.assert_array_equal(plan.rows, planners.least_loaded(jnp.int32(HOT), 4, 263))
    assert plan.most_rows == 263
    np.testing.assert_array_equal(plan.slots, [[8, 8], [0, 8], [0, 8], [0, 8]])


@pytest.mark.slow
@pytest.mark.parametrize(
    "change", [{"num_rows": 262}, {"min_chunk": 300}], ids=["capacity", "forced chunk"]
)
def test_third_rung_one_owner_where_a_device_gets_too_many_rows(change):
    limits = {"min_chunk": 1, "num_rows": 263, "num_slots": 2} | change
    plan = plan_of(HOT, 4, **limits)
    want = planners.one_owner(jnp.int32(HOT), 4, limits["num_rows"])
    np.testing.assert_array_equal(plan.rows, want)
    assert plan.most_rows <= limits["num_rows"]


def test_devices_are_equally_full_where_the_rows_are_less_than_the_mean():
    assert plan_of(HOT, 4, min_chunk=1, num_rows=100, num_slots=2).most_rows == 250


# Least-loaded fills device 3 from devices 0 and 1, one-owner from one of them.
TWO_HOT = [60, 62, 20, 0]


@pytest.mark.slow
def test_third_rung_one_owner_where_a_device_gets_too_many_foreign_experts():
    options = {"alpha": 1.0, "min_chunk": 1, "num_rows": 99}
    most_foreign = lambda rows: ((np.asarray(rows) > 0) & is_foreign(4, 4)).sum(0).max()
    least = planners.least_loaded(jnp.int32(TWO_HOT), 4, 36)
    owner = planners.one_owner(jnp.int32(TWO_HOT), 4, 36)
    assert (most_foreign(least), most_foreign(owner)) == (2, 1)
    plan = plan_of(TWO_HOT, 4, num_slots=2, **options)
    np.testing.assert_array_equal(plan.rows, least)
    plan = plan_of(TWO_HOT, 4, num_slots=1, **options)
    np.testing.assert_array_equal(plan.rows, owner)


@pytest.mark.slow
def test_fourth_rung_sends_the_smaller_foreign_experts_home():
    loads = [10, 10, 10, 9, 0, 0, 0, 0]
    plan = plan_of(loads, 2, alpha=1.0, min_chunk=1, num_rows=20, num_slots=1)
    np.testing.assert_array_equal(plan.rows[:, 1], [10, 0, 0, 0, 0, 0, 0, 0])
    assert plan.most_rows == 29
    assert plan_of(loads, 2, alpha=1.0, min_chunk=1, num_rows=20, num_slots=2).most_rows == 20


def test_truncated_keeps_the_largest_and_of_equal_ones_the_first():
    rows = jnp.int32([[5, 3], [5, 4], [5, 3], [5, 0], [0, 6], [2, 6], [0, 6], [0, 6]])
    np.testing.assert_array_equal(
        truncated(rows, 2), [[5, 3], [5, 4], [8, 0], [5, 0], [0, 6], [2, 6], [0, 6], [0, 6]]
    )
    np.testing.assert_array_equal(truncated(rows, 4), rows)
    np.testing.assert_array_equal(truncated(rows, 0), planners.native(rows.sum(1), 2))


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 2**20) | st.just(0), min_size=6, max_size=6),
    st.sampled_from([(1, 1), (2, 1), (3, 2), (6, 0)]),
    st.sampled_from([1, 2**19]),
)
def test_edges(loads, num_devices_and_slots, rows):
    num_devices, num_slots = num_devices_and_slots
    limits = {"num_rows": rows, "num_slots": num_slots}
    loads = np.int32([loads])
    plan = plans(num_devices, loads, options=tuple((OPTIONS | limits).items()))
    check(plan, loads, **limits)


def test_without_rows_nothing_happens():
    plan = plan_of([0] * 8, 4, min_chunk=1, num_rows=8, num_slots=2)
    assert not plan.rows.any()
    assert not plan.has_foreign
    assert plan.most_rows == 0


@pytest.mark.slow
def test_inside_shard_map_under_remat_scan_and_grad():
    """The plan is no obstacle to gradients of what it decides."""
    mesh = jax.make_mesh((4,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    counts = np.int32(np.diag([2, 30, 7, 900])[:, [3, 1, 2, 0]])

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(jax.P("expert"), jax.P()), out_specs=(jax.P(), jax.P())
    )
    def run(counts, x):
        loads = jax.lax.psum(counts[0], "expert")

        @jax.checkpoint
        def layer(x, _):
            plan = rebalance(loads, 4, min_chunk=8, num_rows=400, num_slots=1)
            return x * jnp.where(plan.has_foreign, plan.rows.sum(0).max(), 1), plan.rows

        return jax.lax.scan(layer, x, length=2)

    (out, rows), vjp = jax.vjp(lambda x: run(counts, x), 1.0)
    want = plan_of(counts.sum(0), 4, min_chunk=8, num_rows=400, num_slots=1).rows
    np.testing.assert_array_equal(rows, [want, want])
    assert want.sum(0).max() < 400
    (gradient,) = vjp((1.0, np.zeros(rows.shape, jax.dtypes.float0)))
    assert out == gradient == float(want.sum(0).max()) ** 2


@pytest.mark.parametrize("seed", range(3))
def test_split_by_source(seed):
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 40, (5, 12)) * (rng.random((5, 12)) < 0.7)
    counts = counts.astype(np.int32)
    loads = counts.sum(0)
    rows = planners.least_loaded(loads, 4, -(-loads.sum() // 4), min_chunk=1)
    split = np.asarray(jax.jit(split_by_source)(rows, counts))
    for expert in range(12):
        source = np.repeat(np.arange(5), counts[:, expert])  # of each row, by its number
        device = np.repeat(np.arange(4), np.asarray(rows)[expert])
        want = np.zeros((5, 4), int)
        np.add.at(want, (source, device), 1)
        np.testing.assert_array_equal(split[:, expert], want)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 60),
    st.integers(1, 9),
    st.sampled_from([1.0, 1.01, 1.05, 1.25, 2.0, 12.5]),
    st.sampled_from([0.0, 1.0, 1.3, 3.0]),
    st.integers(-1, 80),
)
@example(6, 8, 1.25, 0.0, 9)  # the largest bound is at 44 rows, neither at an end nor at the turn
def test_num_rows_is_the_largest_bound_over_all_sums(rows, num_devices, alpha, skip, min_chunk):
    def bound(total):
        capacity = ceil_of_mean(total, num_devices, alpha)
        slack = (num_devices - 2) * (max(min_chunk, 1) - 1) - (num_devices * capacity - total)
        return min(total, capacity + max(0, slack))

    largest = max(map(bound, range(num_devices * rows + 1)))
    balanced = min(num_devices * rows, ceil_of_mean(num_devices * rows, num_devices, skip) - 1)
    options = {"alpha": alpha, "skip_below": skip, "min_chunk": min_chunk}
    assert num_rows(rows, num_devices, **options) == max(largest, balanced)


@pytest.mark.slow
def test_num_rows_holds_what_the_first_two_rungs_need():
    options = {"alpha": 1.05, "skip_below": 1.3, "min_chunk": 700}
    rows = num_rows(10_000, 8, **options)
    assert rows == 12_999
    loads = random_loads(1500, 64, 8, most=80_000, seed=12)
    plan = plans(8, loads, options=(*options.items(), ("num_rows", rows), ("num_slots", 64)))
    most = np.asarray(plan.rows).sum(1).max(1)
    assert rows - 200 < most.max() <= rows
    assert num_rows(1000, 8, **options) > 1300  # there chunks of 700 rows overfill a device


@settings(deadline=None)
@given(st.integers(0, 2**31 - 1), st.integers(1, 1000), st.integers(1, 2000))
def test_ceil_of_mean_is_exact_in_int32(total, num_devices, thousandths):
    want = -(-total * thousandths // (1000 * num_devices))
    factor = thousandths / 1000
    assert ceil_of_mean(total, num_devices, factor) == want
    if want < 2**31:
        assert ceil_of_mean(jnp.int32(total), num_devices, factor) == want


def test_min_chunk_is_where_moving_and_computing_take_equally_long():
    # An H200: 495 TFLOP/s and 450 GB/s, weights in bfloat16.
    assert min_chunk_from(495e12, 450e9, 2) == 1100
    rows, weights = min_chunk_from(1e12, 3e9, 2), 5e6
    assert 2 * weights * rows / 1e12 == pytest.approx(2 * weights / 3e9, rel=3e-3)
    assert min_chunk_from(1, 1e9, 2) == 1
    assert isinstance(min_chunk_from(1e12, 3e9, 2), int)
    assert math.ceil(1e12 / 3e9) == rows


@pytest.mark.parametrize(
    "change, what",
    [
        ({"alpha": 0.99}, "alpha=0.99 leaves no room.*at least 1"),
        ({"num_rows": 0}, "num_rows=0 must be at least 1"),
        ({"num_slots": -1}, "num_slots=-1 must not be negative"),
        ({"skip_below": 1e9}, "factor 1000000000.0 is too large or too fine for 4 devices"),
    ],
)
def test_options_that_cannot_be_are_errors(change, what):
    options = {"min_chunk": 1, "num_rows": 9, "num_slots": 1} | change
    with pytest.raises(UserError, match=what):
        rebalance(jnp.ones(8, jnp.int32), 4, **options)


def test_experts_that_no_devices_share_evenly_are_an_error():
    with pytest.raises(ValueError, match="8 experts for 3 devices"):
        rebalance(jnp.ones(8, jnp.int32), 3, min_chunk=1, num_rows=9, num_slots=1)
