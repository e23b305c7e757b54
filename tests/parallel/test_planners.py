"""Planners: rows are conserved, the proven bounds of the one-owner plan, determinism."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.kernels.least_loaded import least_loaded_plan
from moejax.parallel import planners
from tests.parallel.random_loads import random_loads

PLANNERS = (planners.native, planners.least_loaded, planners.one_owner)


@functools.partial(jax.jit, static_argnums=(0, 1))
def plans(planner, num_devices, loads, capacity):
    return jax.lax.map(lambda x: planner(x[0], num_devices, x[1]), (loads, capacity))


def foreign(plan):
    """Rows on other devices than the owner, `[..., E, P]`."""
    num_experts, num_devices = plan.shape[-2:]
    owner = np.arange(num_experts) // (num_experts // num_devices)
    return plan * (owner[:, None] != np.arange(num_devices))


def capacities(loads, num_devices, seed):
    """The least that suffices for half of the loads, up to 1.5 times as much for the others."""
    rng = np.random.default_rng(seed)
    least = -(-loads.sum(1) // num_devices)
    larger = np.ceil(rng.uniform(1, 1.5, len(loads)) * least)
    return np.where(rng.random(len(loads)) < 0.5, least, larger).astype(np.int32)


def check_one_owner(plan, loads, capacity):
    num_devices = plan.shape[-1]
    per_device = plan.shape[-2] // num_devices
    np.testing.assert_array_equal(plan.sum(2, dtype=np.int64), loads)
    assert plan.min(initial=0) >= 0
    assert (plan.sum(1, dtype=np.int64) <= capacity[:, None]).all()
    sent = (foreign(plan) > 0).reshape(-1, num_devices, per_device, num_devices)
    owners_of_receiver = sent.any(2).sum(1)  # [case, receiver]
    sends_of_owner = sent.sum((2, 3))  # [case, owner]
    assert owners_of_receiver.max(initial=0) <= 1
    assert sends_of_owner.max(initial=0) <= max(num_devices + per_device - 2, 0)
    return sent


@pytest.mark.parametrize(
    "num_devices, per_device, most", [(8, 4, 500_000), (8, 16, 2**30), (16, 2, 60_000), (3, 5, 99)]
)
def test_one_owner_keeps_its_bounds(num_devices, per_device, most):
    """10,000 loads in all."""
    loads = random_loads(2500, num_devices * per_device, num_devices, most=most, seed=most + 1)
    capacity = capacities(loads, num_devices, seed=0)
    plan = np.asarray(plans(planners.one_owner, num_devices, loads, capacity))
    sent = check_one_owner(plan, loads, capacity)
    gives = sent.any((2, 3))  # [case, owner]
    below = plan.sum(1) < capacity[:, None]
    assert (gives & below).sum() == 0
    native = loads.reshape(-1, num_devices, per_device).sum(2)
    above = native > capacity[:, None]
    assert gives[above].all()
    assert (gives & sent.any((1, 2))).any()  # one that gave too much and was filled


def test_one_owner_attains_its_bounds():
    """Else they would say less than they could."""
    loads = random_loads(2500, 12, 4, most=5000, seed=9)
    plan = np.asarray(plans(planners.one_owner, 4, loads, capacities(loads, 4, seed=1)))
    sent = (foreign(plan) > 0).reshape(-1, 4, 3, 4)
    assert sent.sum((1, 2)).max() == 3  # E/P foreign experts
    assert sent.sum((2, 3)).max() >= 4  # of at most P + E/P - 2 = 5 sends


def test_one_owner_on_an_example_by_hand():
    # 11 rows above the capacity of 10 on device 0, room for 9 and 5 on devices 1 and 2.
    plan = planners.one_owner(jnp.int32([12, 9, 1, 0, 2, 3]), 3, 10)
    np.testing.assert_array_equal(
        plan, [[3, 9, 0], [7, 0, 2], [0, 1, 0], [0, 0, 0], [0, 0, 2], [0, 0, 3]]
    )


def test_one_owner_refills_an_owner_that_had_to_give_too_much():
    # Devices 0 and 1 are 5 above and device 2 is 10 below: 0 gives 10, and gets 5 from 1.
    plan = planners.one_owner(jnp.int32([15, 15, 0]), 3, 10)
    np.testing.assert_array_equal(plan, [[5, 0, 10], [5, 10, 0], [0, 0, 0]])


def test_one_owner_fills_what_room_there_is_where_it_does_not_suffice():
    plan = np.asarray(planners.one_owner(jnp.int32([50, 0, 7, 1]), 2, 10))
    np.testing.assert_array_equal(plan, [[48, 2], [0, 0], [0, 7], [0, 1]])
    np.testing.assert_array_equal(planners.one_owner(jnp.int32([5, 9]), 2, -3), [[5, 0], [0, 9]])


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 2**20) | st.just(3), min_size=6, max_size=6),
    st.sampled_from([1, 2, 3, 6]),
    st.floats(1, 2),
)
def test_one_owner_at_the_edges(loads, num_devices, alpha):
    loads = np.int32([loads])
    capacity = np.int32([np.ceil(alpha * -(-int(loads.sum()) // num_devices))])
    check_one_owner(
        np.asarray(plans(planners.one_owner, num_devices, loads, capacity)), loads, capacity
    )


def test_native_keeps_every_row_at_home():
    plan = planners.native(jnp.int32([3, 0, 2, 7]), 2, 1)
    np.testing.assert_array_equal(plan, [[3, 0], [0, 0], [0, 2], [0, 7]])


def test_least_loaded_is_the_kernels_plan():
    loads = jnp.int32([9000, 0, 40, 0, 70, 80, 0, 0])
    got = planners.least_loaded(loads, 4, 2300, min_chunk=3000)
    want = least_loaded_plan(loads, 4, capacity=2300, min_chunk=3000)
    np.testing.assert_array_equal(got, want)
    assert (got != planners.least_loaded(loads, 4, 2300)).any()


@pytest.mark.slow
@pytest.mark.parametrize("planner", PLANNERS, ids=lambda f: f.__name__)
def test_every_planner_has_one_signature_and_one_meaning(planner):
    assert list(inspect.signature(planner).parameters)[:3] == ["loads", "num_devices", "capacity"]
    loads = random_loads(70, 24, 4, most=70_000, seed=6)
    capacity = capacities(loads, 4, seed=2)
    plan = plans(planner, 4, loads, capacity)
    assert plan.dtype == jnp.int32
    np.testing.assert_array_equal(np.asarray(plan).sum(2), loads)
    with jax.enable_x64(True):
        np.testing.assert_array_equal(planner(np.int64(loads[3]), 4, capacity[3]), plan[3])
    with pytest.raises(ValueError, match="24 experts for 5 devices.*multiple"):
        planner(loads[0], 5, 1)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("planner", PLANNERS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("bad", [np.zeros(8), np.zeros((2, 4), np.int32)], ids=["float", "rank"])
def test_loads_that_are_no_counts_are_an_error(planner, bad):
    with pytest.raises(ValueError, match="vector of integers; got"):
        planner(bad, 4, 1)


@pytest.mark.parametrize("planner", PLANNERS, ids=lambda f: f.__name__)
def test_every_device_makes_the_same_plan_inside_shard_map(planner):
    mesh = jax.make_mesh((4,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    counts = random_loads(4, 12, 4, most=1000, seed=11)

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=jax.P("expert"), out_specs=(jax.P(), jax.P("expert"))
    )
    def run(counts):
        summed = jax.lax.psum(counts[0], "expert")
        gathered = jax.lax.all_gather(counts, "expert", tiled=True).sum(0)
        plan = lambda loads: planner(loads, 4, loads.sum() // 4 + 1)
        return plan(summed), plan(gathered)[None]

    replicated, each = jax.jit(run)(counts)
    loads = counts.sum(0)
    want = planner(loads, 4, loads.sum() // 4 + 1)
    np.testing.assert_array_equal(replicated, want)
    for device in range(4):
        np.testing.assert_array_equal(each[device], want)
