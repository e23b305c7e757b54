"""The slots of the two-hop exchange hold whatever is sent, and the program is what it should be."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as Spec

from moejax.parallel.exchange import exchange, two_hop
from tests.parallel.simulated import mesh_of


def hop_loads(sizes):
    """Rows per pair of devices in each hop, with every row dealt by itself."""
    num_devices = len(sizes)
    first, last = np.zeros((2, num_devices, num_devices), int)
    for source, target in np.ndindex(*sizes.shape):
        via = (source + target + np.arange(sizes[source, target])) % num_devices
        np.add.at(first[source], via, 1)
        np.add.at(last[:, target], via, 1)
    return first.max(), last.max()


def spread(rng, total, num_devices):
    """`total` rows over devices: sometimes even, sometimes on few, with odd remainders."""
    return rng.multinomial(total, rng.dirichlet(np.full(num_devices, 10.0 ** rng.uniform(-2, 2))))


@pytest.mark.parametrize("num_devices", [2, 3, 4, 8])
def test_no_traffic_needs_more_slots(num_devices):
    rng = np.random.default_rng(num_devices)
    for trial in range(300):
        total = trial % (4 * num_devices)  # with few rows the remainders matter most
        sizes = np.array([spread(rng, total, num_devices) for _ in range(num_devices)])
        loads = hop_loads(sizes)[0], hop_loads(sizes.T)[1]
        slots = two_hop.num_slots(total, num_devices)
        assert max(loads) <= slots <= total / num_devices + num_devices


@pytest.mark.parametrize("num_devices", [2, 3, 4, 8])
def test_some_traffic_needs_all_slots(num_devices):
    """Of every target's rows just the last goes by way of device 1."""
    sizes = np.zeros((num_devices, num_devices), int)
    sizes[0] = (1 - np.arange(num_devices)) % num_devices + 1
    loads = hop_loads(sizes)[0], hop_loads(sizes.T)[1]
    assert loads == (num_devices, num_devices)
    assert two_hop.num_slots(int(sizes.sum()), num_devices) == num_devices


NUM_DEVICES, NUM_HELD, NUM_ROWS = 8, 4000, 5000


@functools.cache
def compiled(backward):
    def run(rows, sizes):
        send = functools.partial(exchange, axis="expert", num_rows=NUM_ROWS, backend="two_hop")
        out, vjp = jax.vjp(lambda rows: send(rows, sizes), rows)
        return vjp(out)[0] if backward else out

    own = Spec("expert")
    mesh = mesh_of(expert=NUM_DEVICES)
    run = jax.shard_map(run, mesh=mesh, in_specs=(own, Spec()), out_specs=own)
    rows = [
        jax.ShapeDtypeStruct((NUM_DEVICES * NUM_HELD, 2), jnp.float32),
        jax.ShapeDtypeStruct((NUM_DEVICES * NUM_HELD,), jnp.bfloat16),
    ]
    sizes = jax.ShapeDtypeStruct((NUM_DEVICES, NUM_DEVICES), jnp.int32)
    return jax.jit(run).lower(rows, sizes).compile()


def opcodes(program):
    return re.findall(r"= .*?\b([a-z][a-z0-9-]*)\(", program.as_text())


@pytest.mark.parametrize("backward", [False, True])
def test_two_dense_collectives_per_array_and_direction(backward):
    found = opcodes(compiled(backward))
    assert found.count("all-to-all") == 2 * 2 * (1 + backward)
    communication = {name for name in found if re.match("all-|collective|reduce-scatter", name)}
    assert communication == {"all-to-all"}
    assert "scatter" not in found


@pytest.mark.parametrize("backward", [False, True])
def test_tables_are_as_long_as_the_rows_and_not_times_the_devices(backward):
    text = compiled(backward).as_text()
    outside_fusions = text[text.index("\nENTRY") :]
    shapes = re.findall(r"= (?:s32|pred)\[([\d,]+)\]", outside_fusions)
    sizes = {math.prod(map(int, shape.split(","))) for shape in shapes}
    assert NUM_ROWS <= max(sizes) <= NUM_ROWS + NUM_DEVICES**2
